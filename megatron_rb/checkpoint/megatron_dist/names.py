"""Names of parameters in `torch_dist` checkpoints of megatron-core stacks.

The language model is megatron-core's GPTModel, alone or as `language_model.`. The ViT is made of megatron-core's layers
(`vision_model.decoder.layers.`: Pai-Megatron-Patch and mbridge; Megatron-Bridge for Qwen3-VL) or is transformers' own
module (`visual.` or `vision_model.`: Megatron-Bridge for Qwen2.5-VL, its first releases for Qwen3-VL).
"""

from __future__ import annotations

import re

from megatron_rb.checkpoint.legacy.names import TEXT, legacy_parameter
from megatron_rb.shapes.linears import VISUAL

GATE, UP = "_w", "_v"
"""Endings under which `singleton_local_shards` keeps the two halves of a gated layer apart."""
_STACKED = re.compile(r"(.*\b(?:layers|deepstack_merger_list))\.(?!\d)(.+)")
"""Homogeneous layers share a key, and so do Megatron-Bridge's DeepStack mergers."""
_WRAPPERS = ("module.", "model.")
_GPT = ("decoder.", "embedding.", "output_layer.")
_HF_TOWERS = ("visual.visual.", "vision_model.visual.", "visual.", "vision_model.")
_FIXED = {
    "vision_model.patch_embed.proj.bias": "vision.patch_embed.bias",
    "vision_model.pos_embed.weight": "vision.patch_embed.position",
    "vision_model.decoder.final_layernorm.bias": "vision.merger.norm.bias",
}
_LAYER = re.compile(r"(vision|language)_model\.decoder\.layers\.(\d+)\.(.+)")
_IN_VISION_LAYER = {
    "self_attention.linear_qkv.layer_norm_bias": "norm1.bias",
    "input_layernorm.bias": "norm1.bias",
    "mlp.linear_fc1.layer_norm_bias": "norm2.bias",
    "pre_mlp_layernorm.bias": "norm2.bias",
}
_IN_TEXT_LAYER = {f"self_attention.{part}_layernorm.weight": f"attention.{part}_layernorm.weight" for part in "qk"}
_MERGER = re.compile(
    r"vision_model\.(?:merger|decoder\.deepstack_(?:merger|norm)_list\.(\d+))"
    r"\.(?:encoder\.)?(?:(patch_norm|linear_fc[12])\.)?(weight|bias)"
)
"""Megatron-Bridge keeps norm and layers of a merger together, Pai its norms in a list beside `encoder.linear_fc*`."""


def stacked(key: str) -> tuple[str, str] | None:
    """What stands before and behind the number of the layer in a key whose tensor holds all layers of a module."""
    match = _STACKED.fullmatch(key)
    return (match[1], match[2]) if match else None


def native_name(key: str) -> str | None:
    """The native name of a parameter of megatron-core's layers, numbered globally; None for any other key."""
    key = _unwrapped(key)
    parameter = legacy_parameter(key)
    if parameter is not None:
        return parameter.global_name(0)
    if key in _FIXED:
        return _FIXED[key]
    layer, merger = _LAYER.fullmatch(key), _MERGER.fullmatch(key)
    if layer:
        known = _IN_VISION_LAYER if layer[1] == "vision" else _IN_TEXT_LAYER
        return f"{layer[1]}.layers.{layer[2]}.{known[layer[3]]}" if layer[3] in known else None
    if merger:
        module = "vision.merger" if merger[1] is None else f"vision.deepstack.{merger[1]}"
        return f"{module}.{(merger[2] or 'norm').removeprefix('patch_')}.{merger[3]}"
    return None


def hf_vision_name(key: str) -> str | None:
    """The canonical Hugging Face name that a key of a transformers ViT would have; None where no ViT is named."""
    key = _unwrapped(key)
    prefix = next((tower for tower in _HF_TOWERS if key.startswith(tower)), None)
    return None if prefix is None else f"{VISUAL}.{key.removeprefix(prefix)}"


def _unwrapped(key: str) -> str:
    """The key without the wrappers around the model; a GPTModel alone is named as a language model."""
    while key.startswith(_WRAPPERS):
        key = key.partition(".")[2]
    return f"{TEXT}{key}" if key.startswith(_GPT) else key


def is_adapter(key: str) -> bool:
    """Whether a key is of a LoRA adapter or of a layer that one is wrapped around."""
    return any(word in key for word in (".adapter.", ".to_wrap.", ".lora_", ".adapters."))
