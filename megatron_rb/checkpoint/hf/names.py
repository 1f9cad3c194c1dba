"""Names of tensors and shards in Hugging Face folders."""

from __future__ import annotations

from megatron_rb.shapes.families import FAMILIES
from megatron_rb.shapes.linears import TEXT, VISUAL


def canonical_name(name: str) -> str:
    """Names of all transformers releases to the current `model.visual.*`, `model.language_model.*`, `lm_head.*`."""
    if name.startswith(("lm_head.", f"{VISUAL}.", f"{TEXT}.")):
        return name
    if name.startswith("visual."):
        return f"model.{name}"
    if name.startswith("language_model.lm_head."):
        return name.removeprefix("language_model.")
    for old in ("language_model.model.", "model."):
        if name.startswith(old):
            return f"{TEXT}.{name.removeprefix(old)}"
    return name


def exported_name(canonical: str, family: str) -> str:
    """The name that published folders use and both transformers and serving stacks load.

    Qwen3-VL: the canonical one. Qwen2-VL and Qwen2.5-VL: `visual.*` and `model.*`, as on the hub.
    """
    for prefix, published in FAMILIES[family].published_prefixes:
        if canonical.startswith(prefix):
            return published + canonical.removeprefix(prefix)
    return canonical


def shard_name(index: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"
