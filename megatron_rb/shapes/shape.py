"""The sizes of a RoboBrain model, read from a Hugging Face `config.json` and written nowhere else."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_rb.shapes.defaults import MAY_BE_NULL, TEXT_DEFAULTS, VISION_DEFAULTS
from megatron_rb.shapes.foreign import foreign_kind

FAMILIES = ("qwen2_5_vl", "qwen3_vl")


@dataclass(frozen=True)
class VisionShape:
    """The ViT. All sizes are global (before tensor parallelism)."""

    num_layers: int
    hidden_size: int
    num_heads: int
    ffn_hidden_size: int
    gated_mlp: bool
    activation: str
    norm: str
    """`rmsnorm` or `layernorm`."""
    norm_eps: float
    patch_bias: bool
    patch_size: int
    temporal_patch_size: int
    in_channels: int
    spatial_merge_size: int
    out_hidden_size: int
    rope_theta: float
    window_size: int
    """Side of an attention window in pixels; 0 = every layer attends to the whole frame."""
    full_attention_layers: tuple[int, ...]
    position_grid_side: int
    """Side of the learned position grid that is interpolated to each image; 0 = none."""
    deepstack_layers: tuple[int, ...]
    """Vision layers after which a DeepStack merger taps the hidden state."""
    tokens_per_second: float
    """Temporal positions per second of video (Qwen2.5-VL); 0 = time is written as text (Qwen3-VL)."""

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def merge_unit(self) -> int:
        """Patches that become one token."""
        return self.spatial_merge_size**2

    @property
    def patch_dim(self) -> int:
        """Values of one flattened patch: channels x frames x height x width."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


@dataclass(frozen=True)
class TextShape:
    """The language model. All sizes are global (before tensor parallelism)."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    tied_embeddings: bool
    norm_eps: float
    qkv_bias: bool
    proj_bias: bool
    qk_norm: bool
    rope_theta: float
    mrope_section: tuple[int, ...]
    """Rotary frequencies given to time, height and width."""
    mrope_interleaved: bool
    max_positions: int


@dataclass(frozen=True)
class RoboBrainShape:
    """One RoboBrain model: family, sizes, special tokens, initial weight scale."""

    family: str
    vision: VisionShape
    text: TextShape
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    initializer_range: float


def load_shape(hf_path: str | Path) -> RoboBrainShape:
    """Read `config.json` of a Hugging Face folder (or the file itself).

    Raises:
        ValueError: the file is missing, is not JSON, or describes another model family.
    """
    path = Path(hf_path)
    path = path / "config.json" if path.suffix != ".json" else path
    if not path.is_file():
        kind = foreign_kind(path.parent)
        if kind:
            raise ValueError(f"{path.parent} {kind}")
        raise ValueError(f"no config.json at {path}; model.hf_path must be a Hugging Face folder of a RoboBrain model")
    try:
        raw = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    return shape_from_dict(raw, str(path))


def shape_from_dict(raw: dict[str, Any], origin: str = "config") -> RoboBrainShape:
    """Turn the content of a `config.json` into a `RoboBrainShape`; flat (old) and nested text configs are read."""
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise ValueError(
            f"{origin} has model_type {family!r}; RoboBrain 2.0 is 'qwen2_5_vl' and RoboBrain 2.5 is 'qwen3_vl'"
        )
    text = TEXT_DEFAULTS[family] | _text_section(family, raw)
    vision = VISION_DEFAULTS[family] | (raw.get("vision_config") or {})
    for fields, known in ((text, TEXT_DEFAULTS), (vision, VISION_DEFAULTS)):
        empty = [name for name in known[family] if fields[name] is None and name not in MAY_BE_NULL]
        if empty:
            raise ValueError(f"{origin} gives the field '{empty[0]}' of a {family} model no value")
    vision_shape, text_shape = _vision_shape(family, vision), _text_shape(family, text, _tied(family, raw))
    shape = RoboBrainShape(
        family=family,
        vision=vision_shape,
        text=text_shape,
        image_token_id=raw.get("image_token_id", 151655),
        video_token_id=raw.get("video_token_id", 151656),
        vision_start_token_id=raw.get("vision_start_token_id", 151652),
        vision_end_token_id=raw.get("vision_end_token_id", 151653),
        initializer_range=text["initializer_range"],
    )
    _check(shape, origin)
    return shape


def _text_section(family: str, raw: dict[str, Any]) -> dict[str, Any]:
    """The fields of the language model; only Qwen2.5-VL ever wrote them beside those of the whole."""
    flat = raw if family == "qwen2_5_vl" else {}
    return flat if raw.get("text_config") is None else raw["text_config"]


def _tied(family: str, raw: dict[str, Any]) -> bool:
    # transformers 4 wrote the switch into the text config, transformers 5 at the top level. Only Qwen2.5-VL forwards
    # the nested one (Qwen3-VL reads the top level alone).
    nested = (raw.get("text_config") or {}).get("tie_word_embeddings", False) if family == "qwen2_5_vl" else False
    return bool(raw.get("tie_word_embeddings", False) or nested)


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    # "rope_parameters" since transformers 5, "rope_scaling" + "rope_theta" before; the older word wins there too.
    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "mrope", "axial"):
        raise ValueError(f"rope type {kind!r} is not supported; RoboBrain models use the default multimodal rope")
    return rope


def _vision_shape(family: str, config: dict[str, Any]) -> VisionShape:
    shared = dict(
        num_layers=config["depth"],
        hidden_size=config["hidden_size"],
        num_heads=config["num_heads"],
        ffn_hidden_size=config["intermediate_size"],
        norm_eps=1e-6,
        patch_size=config["patch_size"],
        temporal_patch_size=config["temporal_patch_size"],
        in_channels=config["in_channels"],
        spatial_merge_size=config["spatial_merge_size"],
        out_hidden_size=config["out_hidden_size"],
        rope_theta=float(_rope(config).get("rope_theta", 10000.0)),
    )
    if family == "qwen2_5_vl":
        return VisionShape(
            **shared,
            gated_mlp=True,
            activation=config["hidden_act"],
            norm="rmsnorm",
            patch_bias=False,
            window_size=config["window_size"],
            full_attention_layers=tuple(config["fullatt_block_indexes"]),
            position_grid_side=0,
            deepstack_layers=(),
            tokens_per_second=float(config["tokens_per_second"]),
        )
    return VisionShape(
        **shared,
        gated_mlp=False,
        activation=config["hidden_act"],
        norm="layernorm",
        patch_bias=True,
        window_size=0,
        full_attention_layers=tuple(range(config["depth"])),
        position_grid_side=round(config["num_position_embeddings"] ** 0.5),
        deepstack_layers=tuple(config["deepstack_visual_indexes"]),
        tokens_per_second=0.0,
    )


def _text_shape(family: str, config: dict[str, Any], tied: bool) -> TextShape:
    rope = _rope(config)
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    if family == "qwen2_5_vl":
        head_dim = config["hidden_size"] // heads
    attention_bias = bool(config.get("attention_bias"))
    return TextShape(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_heads=heads,
        num_query_groups=config["num_key_value_heads"] or heads,
        head_dim=head_dim,
        vocab_size=config["vocab_size"],
        tied_embeddings=tied,
        norm_eps=config["rms_norm_eps"],
        qkv_bias=True if family == "qwen2_5_vl" else attention_bias,
        proj_bias=False if family == "qwen2_5_vl" else attention_bias,
        qk_norm=family == "qwen3_vl",
        rope_theta=float(rope.get("rope_theta", config["rope_theta"])),
        mrope_section=tuple(rope.get("mrope_section", config["mrope_section"])),
        mrope_interleaved=family == "qwen3_vl",
        max_positions=config["max_position_embeddings"],
    )


def _check(shape: RoboBrainShape, origin: str) -> None:
    vision, text = shape.vision, shape.text
    taps = vision.deepstack_layers
    rules = [
        (
            vision.hidden_size % vision.num_heads == 0,
            f"vision hidden_size {vision.hidden_size} is not a multiple of num_heads {vision.num_heads}",
        ),
        (vision.head_dim % 4 == 0, f"vision head size {vision.head_dim} is not a multiple of 4, as 2-D rope needs"),
        (
            vision.out_hidden_size == text.hidden_size,
            f"vision out_hidden_size {vision.out_hidden_size} differs from the text hidden_size {text.hidden_size}",
        ),
        (
            text.num_heads % text.num_query_groups == 0,
            f"num_attention_heads {text.num_heads} is not a multiple of num_key_value_heads {text.num_query_groups}",
        ),
        (
            sum(text.mrope_section) * 2 == text.head_dim,
            f"mrope_section {list(text.mrope_section)} must sum to half the head size {text.head_dim}",
        ),
        (
            len(taps) <= text.num_layers,
            f"{len(taps)} DeepStack taps need as many decoder layers, there are {text.num_layers}",
        ),
        (
            all(0 <= layer < vision.num_layers for layer in taps),
            f"deepstack_visual_indexes {list(taps)} must lie in 0..{vision.num_layers - 1}",
        ),
    ]
    for holds, message in rules:
        if not holds:
            raise ValueError(f"{origin}: {message}")


def model_fingerprint(shape: RoboBrainShape) -> dict[str, Any]:
    """What identifies a model in a checkpoint's manifest, JSON-able; the initial weight scale is no part of it."""
    fields = asdict(shape)
    del fields["initializer_range"]
    return json.loads(json.dumps(fields))
