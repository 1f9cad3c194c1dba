"""Names of Qwen2.5-VL's parameters in legacy checkpoints, of local and Transformer Engine layers, and their cuts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum, auto

VISION, TEXT = "vision_model.", "language_model."
PROJECTION = "vision_model.projection."


class Cut(Enum):
    """How tensor parallelism cuts a parameter."""

    WHOLE = auto()
    """Every rank holds all of it."""
    ROWS = auto()
    VOCABULARY = auto()
    """Rows, after padding."""
    GATED = auto()
    """Every rank holds its rows of gate, then its rows of up."""
    COLUMNS = auto()


@dataclass(frozen=True)
class LegacyParameter:
    """What a key of a state dict stands for."""

    native: str
    """Native name; `{layer}` stands for the layer's global number."""
    layer: int | None
    """Its number within the chunk."""
    cut: Cut
    is_norm: bool = False

    @property
    def is_text_layer(self) -> bool:
        return self.layer is not None and self.native.startswith("language.")

    def global_name(self, first_layer: int) -> str:
        """The native name, given the global number of the chunk's first layer."""
        return self.native if self.layer is None else self.native.format(layer=first_layer + self.layer)


_FIXED = {
    "vision_model.patch_embed.proj.weight": ("vision.patch_embed.weight", Cut.WHOLE),
    "vision_model.projection.encoder.linear_fc1.weight": ("vision.merger.linear_fc1.weight", Cut.ROWS),
    "vision_model.projection.encoder.linear_fc1.bias": ("vision.merger.linear_fc1.bias", Cut.ROWS),
    "vision_model.projection.encoder.linear_fc2.weight": ("vision.merger.linear_fc2.weight", Cut.COLUMNS),
    "vision_model.projection.encoder.linear_fc2.bias": ("vision.merger.linear_fc2.bias", Cut.WHOLE),
    "language_model.embedding.word_embeddings.weight": ("language.embedding.tokens.weight", Cut.VOCABULARY),
    "language_model.output_layer.weight": ("language.head.output.weight", Cut.VOCABULARY),
}
_FIXED_NORMS = {
    "vision_model.decoder.final_layernorm.weight": "vision.merger.norm.weight",
    "language_model.decoder.final_layernorm.weight": "language.head.norm.weight",
}
_IN_LAYER = {
    "self_attention.linear_qkv.weight": ("attention.linear_qkv.weight", Cut.ROWS),
    "self_attention.linear_qkv.bias": ("attention.linear_qkv.bias", Cut.ROWS),
    "self_attention.linear_proj.weight": ("attention.linear_proj.weight", Cut.COLUMNS),
    "self_attention.linear_proj.bias": ("attention.linear_proj.bias", Cut.WHOLE),
    "mlp.linear_fc1.weight": ("mlp.linear_fc1.weight", Cut.GATED),
    "mlp.linear_fc1.bias": ("mlp.linear_fc1.bias", Cut.GATED),
    "mlp.linear_fc2.weight": ("mlp.linear_fc2.weight", Cut.COLUMNS),
    "mlp.linear_fc2.bias": ("mlp.linear_fc2.bias", Cut.WHOLE),
}
_NORMS_IN_LAYER = {
    # Transformer Engine fuses a norm into the linear layer behind it.
    "input_layernorm.weight": 0,
    "self_attention.linear_qkv.layer_norm_weight": 0,
    "pre_mlp_layernorm.weight": 1,
    "mlp.linear_fc1.layer_norm_weight": 1,
}
_NORM_NAMES = {"vision": ("norm1", "norm2"), "language": ("input_norm", "post_attention_norm")}
_LAYER = re.compile(r"(vision|language)_model\.decoder\.layers\.(\d+)\.(.+)")


def legacy_parameter(key: str) -> LegacyParameter | None:
    """What a key stands for; None for one that is no parameter of a Qwen2.5-VL."""
    if key in _FIXED:
        native, cut = _FIXED[key]
        return LegacyParameter(native, None, cut)
    if key in _FIXED_NORMS:
        return LegacyParameter(_FIXED_NORMS[key], None, Cut.WHOLE, is_norm=True)
    match = _LAYER.fullmatch(key)
    if not match:
        return None
    tower, layer, rest = match[1], int(match[2]), match[3]
    if rest in _NORMS_IN_LAYER:
        norm = _NORM_NAMES[tower][_NORMS_IN_LAYER[rest]]
        return LegacyParameter(f"{tower}.layers.{{layer}}.{norm}.weight", layer, Cut.WHOLE, is_norm=True)
    if rest in _IN_LAYER:
        native, cut = _IN_LAYER[rest]
        return LegacyParameter(f"{tower}.layers.{{layer}}.{native}", layer, cut)
    return None
