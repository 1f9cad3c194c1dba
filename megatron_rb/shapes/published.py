"""The sizes that the config.json files of the published RoboBrain models state, and how many weights they make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_rb.shapes.shape import RoboBrainShape, load_shape, shape_from_dict


def _robobrain20(ffn: int, vision_ffn: int, tied: bool, **text: int) -> dict[str, Any]:
    hidden = text["hidden_size"]
    rope = {"type": "mrope", "mrope_section": [16, 24, 24]}
    return {
        "model_type": "qwen2_5_vl",
        "tie_word_embeddings": tied,
        "intermediate_size": ffn,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_scaling": rope,
        "max_position_embeddings": 128000,
        **text,
        "vision_config": {
            "depth": 32,
            "hidden_size": 1280,
            "num_heads": 16,
            "intermediate_size": vision_ffn,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "in_chans": 3,
            "spatial_merge_size": 2,
            "out_hidden_size": hidden,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "tokens_per_second": 2,
        },
    }


def _robobrain25(ffn: int, tied: bool, vision: dict[str, Any], **text: int) -> dict[str, Any]:
    rope = {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    return {
        "model_type": "qwen3_vl",
        "tie_word_embeddings": tied,
        "text_config": {
            "intermediate_size": ffn,
            "head_dim": 128,
            "vocab_size": 151936,
            "rms_norm_eps": 1e-6,
            "rope_theta": 5e6,
            "rope_scaling": rope,
            "max_position_embeddings": 262144,
            **text,
        },
        "vision_config": {
            "num_heads": 16,
            "patch_size": 16,
            "temporal_patch_size": 2,
            "in_channels": 3,
            "spatial_merge_size": 2,
            "out_hidden_size": text["hidden_size"],
            "num_position_embeddings": 2304,
            **vision,
        },
    }


_VISION_4B = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}
_VISION_8B = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]}

CONFIGS = {
    "RoboBrain2.0-3B": _robobrain20(
        11008,
        3420,
        True,
        vocab_size=151936,
        hidden_size=2048,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
    ),
    "RoboBrain2.0-7B": _robobrain20(
        18944,
        3420,
        False,
        vocab_size=152064,
        hidden_size=3584,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
    ),
    "RoboBrain2.0-32B": _robobrain20(
        27648,
        3456,
        False,
        vocab_size=152064,
        hidden_size=5120,
        num_hidden_layers=64,
        num_attention_heads=40,
        num_key_value_heads=8,
    ),
    "RoboBrain2.5-4B": _robobrain25(
        9728, True, _VISION_4B, hidden_size=2560, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8
    ),
    "RoboBrain2.5-8B": _robobrain25(
        12288, False, _VISION_8B, hidden_size=4096, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8
    ),
}

BASES = {
    "Qwen2.5-VL-3B-Instruct": "RoboBrain2.0-3B",
    "Qwen2.5-VL-7B-Instruct": "RoboBrain2.0-7B",
    "Qwen2.5-VL-32B-Instruct": "RoboBrain2.0-32B",
    "Qwen3-VL-4B-Instruct": "RoboBrain2.5-4B",
    "Qwen3-VL-8B-Instruct": "RoboBrain2.5-8B",
}
"""Models that RoboBrain starts from, which have its sizes."""

PARAMETERS = {
    "RoboBrain2.0-3B": 3_754_622_976,
    "RoboBrain2.0-7B": 8_292_166_656,
    "RoboBrain2.0-32B": 33_452_718_336,
    "RoboBrain2.5-4B": 4_437_815_808,
    "RoboBrain2.5-8B": 8_767_123_696,
}
"""Weights in all, tied ones counted once."""


def published_shape(name: str) -> RoboBrainShape:
    """The sizes of a published model, without its folder."""
    return shape_from_dict(CONFIGS[name], name)


def shape_of(hf_path: str, published: str = "") -> RoboBrainShape:
    """Sizes of a model by its folder; those of a published model, and of one that RoboBrain starts from, without it.

    Args:
        published: model whose sizes hold where the folder is not there and is not named after a known one.
    """
    name = absent_name(hf_path, published)
    return published_shape(BASES.get(name, name)) if name else load_shape(hf_path)


def absent_name(hf_path: str, published: str = "") -> str:
    """The known model that a folder which is not there is named after, or is said to be; empty where it is there.

    Raises:
        ValueError: `published` is none of the published models.
    """
    if published and published not in CONFIGS:
        raise ValueError(f"model.published '{published}' is not known; use {', '.join(CONFIGS)}")
    if Path(hf_path).exists():
        return ""
    name = Path(hf_path).name
    return name if name in (*CONFIGS, *BASES) else published


def missing_weights(hf_path: str, published: str = "") -> str:
    """What is missing of a model that is known here by its sizes alone; empty when its folder is there."""
    name = absent_name(hf_path, published)
    if not name:
        return ""
    if name != Path(hf_path).name:
        return (
            f"the weights at {hf_path} are not there yet: export the run before this one there (`rb convert export`), "
            f"or name a folder in model.hf_path; a {name} is taken until then"
        )
    owner = "Qwen" if name in BASES else "BAAI"
    return (
        f"the weights of {name} are not here: put its Hugging Face folder (huggingface.co/{owner}) at {hf_path}, or "
        f"name another in model.hf_path"
    )
