"""Tiny randomly initialised RoboBrain folders: same architecture and files as the real ones, a few million weights."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen cuts text before merging; every digit stands alone."""

DEFAULT_SYSTEM = "You are a helpful assistant."

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part['type'] == 'video' -%}
{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- elif part['type'] == 'text' -%}
{{- part['text'] -}}
{%- else -%}
{{- raise_exception('unknown content type ' + part['type'] + '; use text, image or video') -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


BRANCH_ENDS = ("o_proj.weight", "down_proj.weight", "attn.proj.weight", "linear_fc2.weight")


@dataclass(frozen=True)
class TinySize:
    """Sizes of a tiny model; head counts and widths divide by 2, so that two tensor-parallel ranks can hold it.

    The defaults learn the demo data on two CPU cores within minutes.
    """

    vision_layers: int = 2
    vision_hidden: int = 128
    vision_heads: int = 4
    vision_ffn: int = 256
    deepstack_layers: tuple[int, ...] = (0, 1)
    """Vision layers tapped for the first decoder layers (Qwen3-VL)."""
    position_grid_side: int = 8
    """Side of the learned position grid (Qwen3-VL)."""
    text_layers: int = 3
    text_hidden: int = 128
    text_heads: int = 4
    text_kv_heads: int = 2
    head_dim: int = 32
    text_ffn: int = 384
    vocab_size: int = 1024
    """Most tokens of the vocabulary, special ones included; rounded up to a multiple of 128 in the embedding."""
    min_pixels: int = 32 * 32
    max_pixels: int = 128 * 128
    """Largest image area after resizing."""
    initializer_range: float = 0.02
    """Written to the config for whoever draws weights anew; the folder's own weights come from `draw_weights`."""


def write_tiny_model(texts: Iterable[str], out: Path, *, family: str = "qwen3_vl", size: TinySize, seed: int) -> int:
    """Write a complete Hugging Face folder whose vocabulary is learnt from `texts`; returns the number of weights.

    Raises:
        ValueError: the family is unknown, or `out` holds something already.
    """
    if family not in _BUILDERS:
        raise ValueError(f"unknown family {family!r}; choose from {', '.join(_BUILDERS)}")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; name a new folder or remove it first")
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(texts, size.vocab_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _BUILDERS[family](tokenizer, size)
        draw_weights(model)
    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=[_token(tokenizer, "<|im_end|>"), _token(tokenizer, "<|endoftext|>")],
        pad_token_id=_token(tokenizer, "<|endoftext|>"),
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    _write_processors(out, _PROCESSORS[family], size)
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def draw_weights(model: PreTrainedModel) -> None:
    """Random weights a narrow model learns from within minutes.

    Matrices scale with 1 / sqrt(inputs), so that a signal keeps its size at any width; residual branches end softly;
    image positions are as loud as the pixels (at the usual 0.02 the model is blind to places for long).
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0.0, _standard_deviation(name, parameter))


def _standard_deviation(name: str, parameter: torch.nn.Parameter) -> float:
    if "pos_embed" in name or "embed_tokens" in name:
        return 0.5
    if "lm_head" in name:
        return 0.02
    ends_a_branch = name.endswith(BRANCH_ENDS) and "merger" not in name
    return (0.35 if ends_a_branch else 1.0) * parameter[0].numel() ** -0.5


def conversation_texts(file: Path) -> list[str]:
    """Every turn of a jsonl file of conversations, with the words the chat template adds."""
    if not file.is_file():
        raise ValueError(f"no file {file}; `rb demo-data` writes one")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    turns = [turn["value"] for row in rows for turn in row["conversations"]]
    return [*turns, *([f"system user assistant\n{DEFAULT_SYSTEM}"] * len(rows))]


def build_tokenizer(texts: Iterable[str], vocab_size: int) -> Qwen2Tokenizer:
    """Byte-level BPE with Qwen's splitting and special tokens, trained on `texts`."""
    smallest = len(pre_tokenizers.ByteLevel.alphabet()) + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size {vocab_size} is below {smallest}, the bytes and the special tokens alone")
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    state = json.loads(bpe.to_str())["model"]
    merges: list[Any] = [tuple(merge) for merge in state["merges"]]
    tokenizer = Qwen2Tokenizer(
        vocab=state["vocab"],
        merges=merges,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS),
        model_max_length=32768,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _token(tokenizer: Qwen2Tokenizer, token: str) -> int:
    return tokenizer.get_vocab()[token]


def _token_ids(tokenizer: Qwen2Tokenizer) -> dict[str, Any]:
    return {
        "image_token_id": _token(tokenizer, "<|image_pad|>"),
        "video_token_id": _token(tokenizer, "<|video_pad|>"),
        "vision_start_token_id": _token(tokenizer, "<|vision_start|>"),
        "vision_end_token_id": _token(tokenizer, "<|vision_end|>"),
    }


def _text_config(tokenizer: Qwen2Tokenizer, size: TinySize) -> dict[str, Any]:
    return {
        "vocab_size": -(-len(tokenizer) // 128) * 128,
        "hidden_size": size.text_hidden,
        "intermediate_size": size.text_ffn,
        "num_hidden_layers": size.text_layers,
        "num_attention_heads": size.text_heads,
        "num_key_value_heads": size.text_kv_heads,
        "max_position_embeddings": 32768,
        "initializer_range": size.initializer_range,
        "rms_norm_eps": 1e-6,
        "bos_token_id": None,
        "eos_token_id": _token(tokenizer, "<|im_end|>"),
    }


def _build_qwen3(tokenizer: Qwen2Tokenizer, size: TinySize) -> PreTrainedModel:
    half = size.head_dim // 2
    text = _text_config(tokenizer, size) | {
        "head_dim": size.head_dim,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5_000_000.0,
            "mrope_section": [half - 2 * (half // 3), half // 3, half // 3],
            "mrope_interleaved": True,
        },
    }
    vision = {
        "depth": size.vision_layers,
        "hidden_size": size.vision_hidden,
        "intermediate_size": size.vision_ffn,
        "num_heads": size.vision_heads,
        "patch_size": 16,
        "out_hidden_size": size.text_hidden,
        "num_position_embeddings": size.position_grid_side**2,
        "deepstack_visual_indexes": list(size.deepstack_layers),
        "initializer_range": size.initializer_range,
    }
    config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **_token_ids(tokenizer))
    return Qwen3VLForConditionalGeneration(config)


def _build_qwen2_5(tokenizer: Qwen2Tokenizer, size: TinySize) -> PreTrainedModel:
    half = size.text_hidden // size.text_heads // 2
    text = _text_config(tokenizer, size) | {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1_000_000.0,
            "mrope_section": [half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8],
        },
    }
    vision = {
        "depth": size.vision_layers,
        "hidden_size": size.vision_hidden,
        "intermediate_size": size.vision_ffn,
        "num_heads": size.vision_heads,
        "patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": list(range(1, size.vision_layers, 2)),
        "tokens_per_second": 2,
        "out_hidden_size": size.text_hidden,
        "initializer_range": size.initializer_range,
    }
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=False, **_token_ids(tokenizer)
    )
    return Qwen2_5_VLForConditionalGeneration(config)


@dataclass(frozen=True)
class _Processors:
    processor: str
    video: str
    patch_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def _write_processors(out: Path, names: _Processors, size: TinySize) -> None:
    """`preprocessor_config.json` and its video twin, written as files: the video class needs torchvision."""
    shared = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": names.mean,
        "image_std": names.std,
        "merge_size": 2,
        "patch_size": names.patch_size,
        "processor_class": names.processor,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": size.min_pixels, "longest_edge": size.max_pixels},
        "temporal_patch_size": 2,
    }
    images = shared | {"image_processor_type": "Qwen2VLImageProcessor"}
    videos = shared | {"video_processor_type": names.video, "do_sample_frames": True, "fps": 2, "max_frames": 64}
    (out / "preprocessor_config.json").write_text(json.dumps(images, indent=2) + "\n")
    (out / "video_preprocessor_config.json").write_text(json.dumps(videos, indent=2) + "\n")


_BUILDERS = {"qwen3_vl": _build_qwen3, "qwen2_5_vl": _build_qwen2_5}
FAMILIES = tuple(_BUILDERS)
_PROCESSORS = {
    "qwen3_vl": _Processors("Qwen3VLProcessor", "Qwen3VLVideoProcessor", 16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "qwen2_5_vl": _Processors(
        "Qwen2_5_VLProcessor",
        "Qwen2VLVideoProcessor",
        14,
        (0.48145466, 0.4578275, 0.40821073),
        (0.26862954, 0.26130258, 0.27577711),
    ),
}
