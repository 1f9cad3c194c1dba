"""Quantised weights of Hugging Face folders: fp8 with block scales is read as values, all others are refused by name.

fp8 as Qwen publishes it: `X.weight` in float8_e4m3fn, `X.weight_scale_inv` with a factor for each block of
`weight_block_size`; the value is their product (transformers, integrations/finegrained_fp8.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_rb.checkpoint.hf.names import canonical_name
from megatron_rb.checkpoint.storage.mosaic import reshaped
from megatron_rb.checkpoint.storage.tensors import BlockScales, StoredTensor

SETTINGS = ("quantization_config", "compression_config")
"""Where a config.json speaks of quantisation; the second is the older word of compressed-tensors."""
PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Types whose elements are the values."""
FP8, SCALE = torch.float8_e4m3fn, "_scale_inv"
DEFAULT_BLOCK = (128, 128)
"""transformers' `FineGrainedFP8Config`."""
_PARTS = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|SCB|weight_format|codes|codebooks|W_q"
    r"|weight_(packed|shape|zero_point|g_idx|scale|scale_2|global_scale|scale_inv|blocks|scales|scale_and_zero)"
    r"|weight\.(absmax|nested_absmax|quant_map|nested_quant_map|quant_state\..+|_.+)|\w+_proj_(blocks|scales))$"
)
"""Names that GPTQ, AWQ, bitsandbytes, compressed-tensors, ModelOpt, mxfp4 and others give the parts of a weight."""
_WAY_OUT = (
    "this stack reads fp32, bf16 and fp16 weights and fp8 with block scales; name the folder it was quantised from, or "
    "dequantise it with the tool that made it"
)


def quantisation(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a config.json says of quantised weights; None when it says nothing."""
    for section in (config, config.get("text_config"), config.get("vision_config")):
        for key in SETTINGS:
            if isinstance(section, Mapping) and section.get(key):
                return section[key]
    return None


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a config.json without its statements of quantisation, as it is true of the values."""
    kept = {key: value for key, value in config.items() if key not in SETTINGS}
    for key in ("text_config", "vision_config"):
        if isinstance(kept.get(key), Mapping):
            kept[key] = {name: value for name, value in kept[key].items() if name not in SETTINGS}
    return kept


def with_values(folder: Path, stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors of a folder with the scales that belong to them.

    Raises:
        ValueError: weights are quantised in another way, or their scales do not fit.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text()) if path.is_file() else {}
    settings = quantisation(config)
    if settings is None:
        _check_plain(folder, stored, "")
        return dict(stored)
    method = _method(settings)
    if method != "fp8":
        raise ValueError(_refusal(folder, stored, method))
    return _with_scales(folder, stored, settings, _stated_dtype(config))


def _method(settings: Mapping[str, Any]) -> str:
    known = settings.get("quant_method")
    if not known and any(settings.get(f"load_in_{bits}bit") for bits in (4, 8)):
        known = "bitsandbytes"
    return str(known or "an unnamed method")


def _stated_dtype(config: Mapping[str, Any]) -> torch.dtype | None:
    """The type that config.json gives the model's weights."""
    for section in (config, config.get("text_config") or {}):
        for key in ("dtype", "torch_dtype"):
            dtype = getattr(torch, str(section.get(key)).removeprefix("torch."), None)
            if dtype in PLAIN:
                return dtype
    return None


def _refusal(folder: Path, stored: Mapping[str, StoredTensor], method: str) -> str:
    shown = next((_shown(t) for n, t in stored.items() if _is_part(n) or _is_odd_weight(n, t)), "")
    if not shown:
        return (
            f"config.json of {folder} says that its weights are quantised with {method}, but they are stored plainly; "
            f"delete {SETTINGS[0]} from it if they are whole weights"
        )
    return f"{folder} holds weights quantised with {method} ({shown}); {_WAY_OUT}"


def _shown(tensor: StoredTensor) -> str:
    return f"{tensor.name} is stored as {_type_name(tensor.dtype)} {list(tensor.shape)}"


def _check_plain(folder: Path, stored: Mapping[str, StoredTensor], method: str) -> None:
    for name, tensor in stored.items():
        if _is_part(name) or _is_odd_weight(name, tensor):
            by = f" with {method}" if method else ""
            silence = "" if method else f", though its config.json has no {SETTINGS[0]}"
            raise ValueError(f"{folder} holds quantised weights{by}{silence} ({_shown(tensor)}); {_WAY_OUT}")


def _is_part(name: str) -> bool:
    return bool(_PARTS.search(name))


def _is_odd_weight(name: str, tensor: StoredTensor) -> bool:
    return name.endswith((".weight", ".bias")) and tensor.dtype not in PLAIN


def _with_scales(
    folder: Path, stored: Mapping[str, StoredTensor], settings: Mapping[str, Any], stated: torch.dtype | None
) -> dict[str, StoredTensor]:
    weights = {name for name, tensor in stored.items() if tensor.dtype == FP8 and name.endswith(".weight")}
    plain = {name: t for name, t in stored.items() if name not in weights and name.removesuffix(SCALE) not in weights}
    _check_plain(folder, plain, "fp8")
    _check_converted(folder, weights, settings.get("modules_to_not_convert") or settings.get("ignored_layers") or ())
    stated_block = settings.get("weight_block_size") if "weight_block_size" in settings else ()
    found = dict(plain)
    for name in stored:
        if name in weights:
            scale = _scale(folder, stored[name], stored.get(name + SCALE), stated_block)
            scales = BlockScales(scale[0], scale[1], stated or scale[0].dtype)
            found[name] = replace(stored[name], scales=scales)
    return found


def _check_converted(folder: Path, weights: Collection[str], kept: Collection[str]) -> None:
    """A module that config.json exempts from quantisation must not be stored as fp8."""
    prefixes = {canonical_name(f"{module}.") for module in kept}
    for name in sorted(weights):
        if any(canonical_name(name).startswith(prefix) for prefix in prefixes):
            raise ValueError(
                f"{folder} stores {name} as fp8, but its config.json lists that module under modules_to_not_convert: "
                "weights and config.json are not of one model; fetch both again"
            )


def _scale(
    folder: Path, weight: StoredTensor, scale: StoredTensor | None, block: Any
) -> tuple[StoredTensor, tuple[int, int]]:
    """The scales of a weight as a matrix, and the size of their blocks.

    Args:
        block: as config.json states it; None = one scale for the whole weight, empty = it says nothing.
    """
    if scale is None:
        raise ValueError(
            f"{folder} stores {weight.name} as fp8 without its scales {weight.name}{SCALE}: its values are lost; fetch "
            "the folder again"
        )
    if len(weight.shape) != 2 or scale.dtype not in PLAIN:
        raise ValueError(f"{folder}: {_shown(weight)} with scales of type {_type_name(scale.dtype)}; {_WAY_OUT}")
    rows, columns = weight.shape
    tall, wide = _block(weight.shape, scale.shape, block)
    grid = (-(-rows // tall), -(-columns // wide))
    if scale.shape != grid and not (grid == (1, 1) and scale.num_bytes == scale.dtype.itemsize):
        raise ValueError(
            f"{folder}: {weight.name} of shape {list(weight.shape)} needs {list(grid)} scales for blocks of "
            f"{tall} x {wide}, {scale.name} has {list(scale.shape)}; its config.json (weight_block_size) is of another "
            "model"
        )
    return reshaped(scale, grid), (tall, wide)


def _block(shape: tuple[int, ...], scales: tuple[int, ...], stated: Any) -> tuple[int, int]:
    """Rows and columns of a block. Where config.json is silent it is the usual one, or else what divides the weight
    evenly, as in transformers.
    """
    if stated is None:
        return max(shape[0], 1), max(shape[1], 1)
    if len(stated) == 2:
        return stated[0], stated[1]
    usual = tuple(-(-size // block) for size, block in zip(shape, DEFAULT_BLOCK, strict=True))
    even = len(scales) == 2 and all(count and not size % count for size, count in zip(shape, scales, strict=True))
    if scales == usual or not even:
        return DEFAULT_BLOCK
    return shape[0] // scales[0], shape[1] // scales[1]


def _type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
