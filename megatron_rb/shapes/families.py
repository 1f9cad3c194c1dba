"""The model families: all that differs between them and follows from no size. To add one, add a record here.

Nobody outside this folder and the weight tables asks which family a model is of: they ask its record for what they
need.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from megatron_rb.shapes.fields import Fields, check_type, mapping
from megatron_rb.shapes.towers import TextShape, VisionShape

ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "quick_gelu", "relu")
"""What an MLP may have between its linears, by Hugging Face names."""
TEXT_FIXED = {
    "hidden_act": "silu",
    "attention_dropout": 0,
    "layer_types": "full_attention",
    "partial_rotary_factor": 1,
}
"""What the layers of every language model compute whatever config.json says, which must not say otherwise."""


class VideoTime(Enum):
    """How the language model learns when a frame of a video was taken."""

    STEPS = "steps"
    """Frames advance the temporal position by one, whatever their rate."""
    POSITIONS = "positions"
    """The temporal position advances with the seconds (`tokens_per_second`)."""
    TEXT = "text"
    """A time stamp stands before every temporal patch, whose positions are those of an image."""


@dataclass(frozen=True)
class VideoDefaults:
    """What the video processor of transformers does, and assumes for a field that its file leaves out."""

    shortest_edge: int
    longest_edge: int
    """Area in pixels; of one frame, or of all of a clip (`whole_clip`)."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    whole_clip: bool
    """Count the pixels of all frames of a clip instead of those of one."""
    whole_patches: bool
    """The number of frames is a multiple of the temporal patch, and frames are taken at equal steps from the first;
    otherwise first and last are taken and any number in between."""


@dataclass(frozen=True)
class VisionNames:
    """Names of the vision tower's modules in Hugging Face files, where families differ."""

    merger_norm: str
    merger_fc1: str
    merger_fc2: str
    mlp_fc1: str
    mlp_fc2: str
    """Of a plain MLP; a gated one is gate_proj, up_proj and down_proj everywhere."""


@dataclass(frozen=True)
class ExampleSizes:
    """Sizes of a small model of any family; what a family does not have is left out."""

    vision_layers: int
    vision_hidden: int
    vision_heads: int
    vision_ffn: int
    text_layers: int
    text_hidden: int
    text_heads: int
    text_kv_heads: int
    text_ffn: int
    vocab_size: int
    head_dim: int = 0
    """Of the language model where it is free; 0 = the hidden size shared among the heads."""
    position_grid_side: int = 8
    deepstack_layers: tuple[int, ...] = (0, 1)
    full_attention_layers: tuple[int, ...] = (1,)
    max_positions: int = 32768
    initializer_range: float = 0.02


@dataclass(frozen=True)
class Family:
    """One family of models."""

    name: str
    """`model_type` of config.json."""
    models: str
    """Published models of this architecture."""
    vision_defaults: Fields
    text_defaults: Fields
    """What transformers' config classes give a field that config.json omits: folders are saved without defaults."""
    read_vision: Callable[[Fields], VisionShape]
    read_text: Callable[[Fields, bool], TextShape]
    """Takes whether head and embedding share their weights."""
    flat_text: bool
    """The fields of the language model may lie beside those of the whole, and its own section may tie embeddings."""
    video_time: VideoTime
    videos: VideoDefaults
    boxes_in_thousandths: bool
    """Boxes are written as 0-1000 of width and height, not as pixels of the picture as it is shown."""
    names: VisionNames
    published_prefixes: tuple[tuple[str, str], ...]
    """(name of transformers' module, name in published files) where they differ."""
    legacy_checkpoints: bool
    """Megatron's legacy checkpoints of this family are read."""
    tower_widths: tuple[int, int]
    """Hidden and ffn size of a published tower."""
    example: Callable[[ExampleSizes], dict[str, Any]]
    """The config.json of a small model, without its special tokens."""
    processor: str
    video_processor: str
    """Processor classes of transformers."""


CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
_PATCHES = {"num_heads": 16, "in_channels": 3, "spatial_merge_size": 2, "temporal_patch_size": 2}
_QWEN2_TEXT = {
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
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 80,
}
_QWEN2_PREFIXES = (("model.visual.", "visual."), ("model.language_model.", "model."))
_QWEN2_VIDEOS = VideoDefaults(128 * 28**2, 768 * 28**2, CLIP_MEAN, CLIP_STD, whole_clip=False, whole_patches=True)


def rope_of(config: Fields) -> dict[str, Any]:
    """The rotary settings of a section: "rope_parameters" since transformers 5, "rope_scaling" + "rope_theta" before;
    the older word wins there too."""
    word = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = mapping(config.get(word) or {}, word)
    if "rope_theta" in rope:
        check_type(rope["rope_theta"], 1.0, f"{word}.rope_theta")
    if "mrope_section" in rope:
        check_type(rope["mrope_section"], [], f"{word}.mrope_section")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "mrope", "axial"):
        raise ValueError(f"rope type {kind!r} is not supported; RoboBrain models use the default multimodal rope")
    return rope


def _vision_sizes(config: Fields) -> dict[str, Any]:
    """What config.json says of every vision tower in the same words."""
    if config["hidden_act"] not in ACTIVATIONS:
        raise ValueError(
            f"vision_config.hidden_act '{config['hidden_act']}' is not supported; known are {', '.join(ACTIVATIONS)}"
        )
    return {
        "num_layers": config["depth"],
        "num_heads": config["num_heads"],
        "activation": config["hidden_act"],
        "norm_eps": 1e-6,
        "patch_size": config["patch_size"],
        "temporal_patch_size": config["temporal_patch_size"],
        "in_channels": config["in_channels"],
        "spatial_merge_size": config["spatial_merge_size"],
        "rope_theta": float(rope_of(config).get("rope_theta", 10000.0)),
    }


def _text_sizes(config: Fields, tied: bool) -> dict[str, Any]:
    """What config.json says of every language model in the same words."""
    rope, heads = rope_of(config), config["num_attention_heads"]
    return {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "num_heads": heads,
        "num_query_groups": config["num_key_value_heads"] or heads,
        "vocab_size": config["vocab_size"],
        "tied_embeddings": tied,
        "norm_eps": config["rms_norm_eps"],
        "rope_theta": float(rope["rope_theta"] if "rope_theta" in rope else config["rope_theta"]),
        "mrope_section": tuple(rope["mrope_section"] if "mrope_section" in rope else config["mrope_section"]),
        "max_positions": config["max_position_embeddings"],
    }


def _without_windows(config: Fields) -> VisionShape:
    """The tower of Qwen2-VL: LayerNorm, plain MLP, whole frames; its sizes have names of their own."""
    return VisionShape(
        **_vision_sizes(config),
        hidden_size=config["embed_dim"],
        ffn_hidden_size=int(config["embed_dim"] * config["mlp_ratio"]),
        out_hidden_size=config["hidden_size"],
        gated_mlp=False,
        norm="layernorm",
        patch_bias=False,
        window_size=0,
        full_attention_layers=tuple(range(config["depth"])),
        position_grid_side=0,
        deepstack_layers=(),
        tokens_per_second=0.0,
    )


def _with_windows(config: Fields) -> VisionShape:
    """The tower of Qwen2.5-VL: RMSNorm, gated MLP, windows in most layers."""
    return VisionShape(
        **_vision_sizes(config),
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        out_hidden_size=config["out_hidden_size"],
        gated_mlp=True,
        norm="rmsnorm",
        patch_bias=False,
        window_size=config["window_size"],
        full_attention_layers=tuple(config["fullatt_block_indexes"]),
        position_grid_side=0,
        deepstack_layers=(),
        tokens_per_second=float(config["tokens_per_second"]),
    )


def _with_deepstack(config: Fields) -> VisionShape:
    """The tower of Qwen3-VL: LayerNorm, plain MLP, learned positions, DeepStack mergers."""
    positions = config["num_position_embeddings"]
    side = math.isqrt(positions)
    if side**2 != positions:
        raise ValueError(
            f"vision_config.num_position_embeddings {positions} is no square grid; {side**2} and {(side + 1) ** 2} are"
        )
    return VisionShape(
        **_vision_sizes(config),
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        out_hidden_size=config["out_hidden_size"],
        gated_mlp=False,
        norm="layernorm",
        patch_bias=True,
        window_size=0,
        full_attention_layers=tuple(range(config["depth"])),
        position_grid_side=side,
        deepstack_layers=tuple(config["deepstack_visual_indexes"]),
        tokens_per_second=0.0,
    )


def _qwen2_text(config: Fields, tied: bool) -> TextShape:
    windowed = config["num_hidden_layers"] - config["max_window_layers"]
    if config["use_sliding_window"] and config["sliding_window"] and windowed > 0:
        raise ValueError(
            f"use_sliding_window is true for {windowed} layers of the language model, whose attention is full here; "
            f"no RoboBrain model was trained so, set it to false"
        )
    return TextShape(
        **_text_sizes(config, tied),
        head_dim=config["hidden_size"] // config["num_attention_heads"],
        qkv_bias=True,
        proj_bias=False,
        qk_norm=False,
        mrope_interleaved=False,
    )


def _qwen3_text(config: Fields, tied: bool) -> TextShape:
    bias = bool(config["attention_bias"])
    return TextShape(
        **_text_sizes(config, tied),
        head_dim=config["head_dim"] or config["hidden_size"] // config["num_attention_heads"],
        qkv_bias=bias,
        proj_bias=bias,
        qk_norm=True,
        mrope_interleaved=True,
    )


def _example_text(sizes: ExampleSizes, rope_theta: float, section: list[int], **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": sizes.vocab_size,
        "hidden_size": sizes.text_hidden,
        "intermediate_size": sizes.text_ffn,
        "num_hidden_layers": sizes.text_layers,
        "num_attention_heads": sizes.text_heads,
        "num_key_value_heads": sizes.text_kv_heads,
        "max_position_embeddings": sizes.max_positions,
        "initializer_range": sizes.initializer_range,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta, "mrope_section": section, **more},
    }


def _example(name: str, text: dict[str, Any], sizes: ExampleSizes, **vision: Any) -> dict[str, Any]:
    shared = {
        "depth": sizes.vision_layers,
        "num_heads": sizes.vision_heads,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "initializer_range": sizes.initializer_range,
    }
    return {
        "model_type": name,
        "tie_word_embeddings": False,
        "text_config": text,
        "vision_config": {**shared, **vision},
    }


def _qwen2_section(sizes: ExampleSizes) -> list[int]:
    half = sizes.text_hidden // sizes.text_heads // 2
    return [half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8]


def _qwen2_example(sizes: ExampleSizes) -> dict[str, Any]:
    return _example(
        "qwen2_vl",
        _example_text(sizes, 1e6, _qwen2_section(sizes)),
        sizes,
        embed_dim=sizes.vision_hidden,
        mlp_ratio=sizes.vision_ffn // sizes.vision_hidden,
        hidden_size=sizes.text_hidden,
        patch_size=14,
    )


def _qwen2_5_example(sizes: ExampleSizes) -> dict[str, Any]:
    return _example(
        "qwen2_5_vl",
        _example_text(sizes, 1e6, _qwen2_section(sizes)),
        sizes,
        hidden_size=sizes.vision_hidden,
        intermediate_size=sizes.vision_ffn,
        out_hidden_size=sizes.text_hidden,
        patch_size=14,
        window_size=112,
        fullatt_block_indexes=list(sizes.full_attention_layers),
        tokens_per_second=2,
    )


def _qwen3_example(sizes: ExampleSizes) -> dict[str, Any]:
    head_dim = sizes.head_dim or sizes.text_hidden // sizes.text_heads
    half = head_dim // 2
    section = [half - 2 * (half // 3), half // 3, half // 3]
    return _example(
        "qwen3_vl",
        _example_text(sizes, 5e6, section, mrope_interleaved=True) | {"head_dim": head_dim},
        sizes,
        hidden_size=sizes.vision_hidden,
        intermediate_size=sizes.vision_ffn,
        out_hidden_size=sizes.text_hidden,
        patch_size=16,
        num_position_embeddings=sizes.position_grid_side**2,
        deepstack_visual_indexes=list(sizes.deepstack_layers),
    )


_QWEN2_VL = Family(
    name="qwen2_vl",
    models="Qwen2-VL",
    vision_defaults=_PATCHES
    | {
        "depth": 32,
        "embed_dim": 1280,
        "hidden_size": 3584,
        "mlp_ratio": 4,
        "hidden_act": "quick_gelu",
        "patch_size": 14,
    },
    text_defaults=_QWEN2_TEXT,
    read_vision=_without_windows,
    read_text=_qwen2_text,
    flat_text=True,
    video_time=VideoTime.STEPS,
    videos=_QWEN2_VIDEOS,
    boxes_in_thousandths=True,
    names=VisionNames("ln_q", "mlp.0", "mlp.2", "fc1", "fc2"),
    published_prefixes=_QWEN2_PREFIXES,
    legacy_checkpoints=False,
    tower_widths=(1280, 5120),
    example=_qwen2_example,
    processor="Qwen2VLProcessor",
    video_processor="Qwen2VLVideoProcessor",
)
_QWEN2_5_VL = Family(
    name="qwen2_5_vl",
    models="RoboBrain 2.0",
    vision_defaults=_PATCHES
    | {
        "depth": 32,
        "hidden_size": 3584,
        "intermediate_size": 3420,
        "out_hidden_size": 3584,
        "hidden_act": "silu",
        "patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 4,
    },
    text_defaults=_QWEN2_TEXT,
    read_vision=_with_windows,
    read_text=_qwen2_text,
    flat_text=True,
    video_time=VideoTime.POSITIONS,
    videos=_QWEN2_VIDEOS,
    boxes_in_thousandths=False,
    names=VisionNames("ln_q", "mlp.0", "mlp.2", "", ""),
    published_prefixes=_QWEN2_PREFIXES,
    legacy_checkpoints=True,
    tower_widths=(1280, 3420),
    example=_qwen2_5_example,
    processor="Qwen2_5_VLProcessor",
    video_processor="Qwen2VLVideoProcessor",
)
_QWEN3_VL = Family(
    name="qwen3_vl",
    models="RoboBrain 2.5",
    vision_defaults=_PATCHES
    | {
        "depth": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "out_hidden_size": 3584,
        "hidden_act": "gelu_pytorch_tanh",
        "patch_size": 16,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [8, 16, 24],
    },
    text_defaults={
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
    read_vision=_with_deepstack,
    read_text=_qwen3_text,
    flat_text=False,
    video_time=VideoTime.TEXT,
    videos=VideoDefaults(128 * 32**2, 768 * 32**2, HALF, HALF, whole_clip=True, whole_patches=False),
    boxes_in_thousandths=True,
    names=VisionNames("norm", "linear_fc1", "linear_fc2", "linear_fc1", "linear_fc2"),
    published_prefixes=(),
    legacy_checkpoints=False,
    tower_widths=(1152, 4304),
    example=_qwen3_example,
    processor="Qwen3VLProcessor",
    video_processor="Qwen3VLVideoProcessor",
)

FAMILIES: Mapping[str, Family] = {family.name: family for family in (_QWEN3_VL, _QWEN2_5_VL, _QWEN2_VL)}
NEWEST = _QWEN3_VL.name
"""What examples are of where nothing else is asked for."""


def family_of(name: Any, origin: str) -> Family:
    """The record of a `model_type`.

    Raises:
        ValueError: it is none of those known here.
    """
    if not isinstance(name, str) or name not in FAMILIES:
        known = ", ".join(f"{family.name!r} ({family.models})" for family in FAMILIES.values())
        raise ValueError(f"{origin} has model_type {name!r}; known are {known}")
    return FAMILIES[name]
