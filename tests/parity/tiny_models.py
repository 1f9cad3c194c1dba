"""Random tiny Hugging Face models of every family, and random samples for them: the oracle of the parity tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

DEFAULT_ROPE = {"rope_type": "default"}
SPECIAL = {"image_token_id": 11, "video_token_id": 12, "vision_start_token_id": 13, "vision_end_token_id": 14}


def qwen3_config(seed: int, **text) -> Qwen3VLConfig:
    """A random small Qwen3-VL: sizes vary with the seed."""
    draw = np.random.default_rng(seed)
    heads = 4
    head_dim = int(draw.choice([16, 24, 32]))
    section = [head_dim // 2 - 2 * (head_dim // 8), head_dim // 8, head_dim // 8]
    layers = int(draw.integers(4, 6))
    hidden = int(draw.choice([48, 64, 80]))
    vision_layers = int(draw.integers(4, 6))
    return Qwen3VLConfig(
        vision_config=dict(
            depth=vision_layers,
            hidden_size=32,
            intermediate_size=int(draw.choice([40, 52])),
            num_heads=4,
            patch_size=8,
            spatial_merge_size=2,
            temporal_patch_size=2,
            out_hidden_size=hidden,
            num_position_embeddings=int(draw.choice([16, 36])),
            deepstack_visual_indexes=[0, 2, vision_layers - 1],
        ),
        text_config=dict(
            vocab_size=128,
            hidden_size=hidden,
            intermediate_size=96,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=int(draw.choice([2, 4])),
            head_dim=head_dim,
            rope_parameters={"rope_theta": 5e5, "mrope_section": section, "mrope_interleaved": True} | DEFAULT_ROPE,
            max_position_embeddings=4096,
            **text,
        ),
        tie_word_embeddings=bool(seed % 2),
        **SPECIAL,
    )


def _qwen2_text(draw: np.random.Generator, hidden: int) -> dict:
    """The language model that Qwen2-VL and Qwen2.5-VL share."""
    head_dim = hidden // 4
    section = [head_dim // 2 - 2 * (head_dim // 8), head_dim // 8, head_dim // 8]
    return dict(
        vocab_size=128,
        hidden_size=hidden,
        intermediate_size=96,
        num_hidden_layers=int(draw.integers(3, 6)),
        num_attention_heads=4,
        num_key_value_heads=int(draw.choice([2, 4])),
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": section},
        rms_norm_eps=1e-6,
        max_position_embeddings=4096,
    )


def qwen2_5_config(seed: int, **text) -> Qwen2_5_VLConfig:
    """A random small Qwen2.5-VL: sizes vary with the seed."""
    draw = np.random.default_rng(seed)
    hidden = int(draw.choice([64, 96]))
    vision_layers = int(draw.integers(3, 6))
    return Qwen2_5_VLConfig(
        vision_config=dict(
            depth=vision_layers,
            hidden_size=32,
            intermediate_size=(52, 53, 40)[seed % 3],
            num_heads=4,
            patch_size=4,
            spatial_merge_size=2,
            temporal_patch_size=2,
            out_hidden_size=hidden,
            window_size=16,
            fullatt_block_indexes=[1, vision_layers - 1],
            tokens_per_second=2,
        ),
        text_config=_qwen2_text(draw, hidden) | text,
        tie_word_embeddings=bool(seed % 2),
        **SPECIAL,
    )


def qwen2_config(seed: int, **text) -> Qwen2VLConfig:
    """A random small Qwen2-VL: sizes vary with the seed."""
    draw = np.random.default_rng(seed)
    hidden = int(draw.choice([64, 96]))
    return Qwen2VLConfig(
        vision_config=dict(
            depth=int(draw.integers(3, 6)),
            embed_dim=32,
            hidden_size=hidden,
            mlp_ratio=int(draw.choice([2, 3])),
            num_heads=4,
            patch_size=4,
            spatial_merge_size=2,
            temporal_patch_size=2,
        ),
        text_config=_qwen2_text(draw, hidden) | text,
        tie_word_embeddings=bool(seed % 2),
        **SPECIAL,
    )


MODELS = {
    "qwen3_vl": (qwen3_config, Qwen3VLForConditionalGeneration),
    "qwen2_5_vl": (qwen2_5_config, Qwen2_5_VLForConditionalGeneration),
    "qwen2_vl": (qwen2_config, Qwen2VLForConditionalGeneration),
}


def write_model(folder: str | Path, family: str, seed: int, **text) -> Path:
    """Save a randomly initialised tiny model; every weight, biases and norms too, is random."""
    make_config, model_class = MODELS[family]
    torch.manual_seed(seed)
    model = model_class(make_config(seed, **text)).float()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.2 * noise if parameter.dim() == 1 and parameter.mean() > 0.5 else 0.15 * noise)
    model.save_pretrained(folder)
    return Path(folder)
