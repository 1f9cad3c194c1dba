"""What transformers' config classes give a field that config.json omits: folders are saved without their defaults."""

from __future__ import annotations

from typing import Any

_SHARED_VISION: dict[str, Any] = {
    "num_heads": 16,
    "in_channels": 3,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 3584,
}
VISION_DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": _SHARED_VISION
    | {
        "depth": 32,
        "hidden_size": 3584,
        "intermediate_size": 3420,
        "hidden_act": "silu",
        "patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 4,
    },
    "qwen3_vl": _SHARED_VISION
    | {
        "depth": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "hidden_act": "gelu_pytorch_tanh",
        "patch_size": 16,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [8, 16, 24],
    },
}
TEXT_DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {
        "vocab_size": 152064,
        "hidden_size": 8192,
        "intermediate_size": 29568,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "mrope_section": [16, 24, 24],
        "max_position_embeddings": 32768,
        "initializer_range": 0.02,
    },
    "qwen3_vl": {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 5e5,
        "mrope_section": [24, 20, 20],
        "max_position_embeddings": 128000,
        "initializer_range": 0.02,
        "attention_bias": False,
    },
}
MAY_BE_NULL = ("num_key_value_heads", "head_dim")
"""Fields whose null has a meaning of its own: as many as heads, the hidden size shared among them."""
