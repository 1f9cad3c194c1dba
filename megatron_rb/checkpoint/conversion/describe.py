"""What a folder is, from its descriptions alone."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_rb.checkpoint.conversion.verify import find_side
from megatron_rb.checkpoint.hf.folder import find_tensors, match_tensors
from megatron_rb.checkpoint.hf.table import stored_rules
from megatron_rb.checkpoint.legacy.arguments import plain_value
from megatron_rb.checkpoint.legacy.tree import is_legacy_checkpoint, read_tree
from megatron_rb.checkpoint.manifest import read_manifest
from megatron_rb.checkpoint.megatron_dist.folders import find_megatron_dist, read_megatron_dist
from megatron_rb.checkpoint.storage.tensors import StoredTensor
from megatron_rb.checkpoint.storage.torch_dist import read_dist_folder
from megatron_rb.shapes.foreign import adapter_settings, is_adapter
from megatron_rb.shapes.shape import load_shape

OPTIMIZER = "optimizer.state."
MODULES = ("vision", "merger", "embedding", "decoder", "head")


def describe(path: str | Path) -> dict[str, Any]:
    """Format, step, family, parameters per module, types, layout, platform and size of a folder, JSON-able.

    Raises:
        ValueError: it is none that is known, or is damaged.
    """
    if Path(path).is_dir() and is_adapter(Path(path)):
        return _describe_adapter(Path(path))
    if Path(path).is_dir() and is_legacy_checkpoint(path):
        return _describe_legacy(Path(path))
    iteration = find_megatron_dist(path)
    if iteration is not None:
        return _describe_dist(iteration)
    side = find_side(path)
    return _describe_hf(side.path) if side.checkpoint is None else _describe_checkpoint(side.checkpoint)


def _describe_hf(folder: Path) -> dict[str, Any]:
    shape = load_shape(folder)
    tensors = match_tensors(folder, find_tensors(folder), shape).tensors
    natives = {hf: name for name, rule in stored_rules(shape).items() for hf in rule.hf_names}
    sizes = {name: _module(natives[name]) for name in tensors}
    return {
        "format": "Hugging Face",
        "folder": str(folder),
        "family": shape.family,
        "tied_embeddings": shape.text.tied_embeddings,
        "parameters": _per_module(tensors, sizes),
        "dtypes": _dtypes(tensors.values()),
        "files": len({path for tensor in tensors.values() for path in tensor.paths}),
        "bytes": sum(tensor.num_bytes for tensor in tensors.values()),
    }


def _describe_checkpoint(folder: Path) -> dict[str, Any]:
    manifest, stored = read_manifest(folder), read_dist_folder(folder)
    weights = {name: t for name, t in stored.tensors.items() if not name.startswith(OPTIMIZER)}
    optimizer = {name: t for name, t in stored.tensors.items() if name.startswith(OPTIMIZER)}
    modules = {name: _module(name) for name in weights}
    conversion = folder / "manifest.json"
    return {
        "format": "training checkpoint",
        "folder": str(folder),
        "step": manifest["step"],
        "family": manifest["model"]["family"],
        "tied_embeddings": manifest["model"]["text"]["tied_embeddings"],
        "parameters": _per_module(weights, modules),
        "dtypes": _dtypes(weights.values()),
        "optimizer": sorted({name.removeprefix(OPTIMIZER).partition(".")[0] for name in optimizer}),
        "optimizer_dtypes": _dtypes(optimizer.values()),
        "objects": sorted(stored.objects),
        "layout": manifest["layout"],
        "platform": manifest["platform"],
        "converted_by": json.loads(conversion.read_text())["conversion"] if conversion.is_file() else "",
        "files": len({path for tensor in stored.tensors.values() for path in tensor.paths}),
        "bytes": sum(tensor.num_bytes for tensor in stored.tensors.values()),
    }


def _describe_legacy(path: Path) -> dict[str, Any]:
    tree = read_tree(path)
    tensors = {
        f"{rank} {chunk} {key}": value
        for rank, file in tree.ranks.items()
        for chunk, state in enumerate(file.chunks)
        for key, value in state.items()
        if isinstance(value, StoredTensor)
    }
    has_optimizer = any(file.tree.get("optimizer") for file in tree.ranks.values())
    return {
        "format": "legacy Megatron checkpoint",
        "folder": str(tree.folder),
        "step": tree.iteration,
        "release": tree.is_release,
        "dtypes": _dtypes(tensors.values()),
        "optimizer": "yes" if has_optimizer else "no",
        "layout": {"tp": tree.tp_size, "pp": tree.pp_size, "virtual_chunks": tree.num_chunks},
        "platform": ", ".join(sorted(tree.device_tags())),
        "args": {name: plain_value(value) for name, value in sorted(tree.first.args.items())},
        "files": len(tree.ranks),
        "bytes": sum(tensor.num_bytes for tensor in tensors.values()),
    }


def _describe_dist(folder: Path) -> dict[str, Any]:
    dist = read_megatron_dist(folder)
    tensors = dist.stored.tensors
    return {
        "format": "distributed Megatron checkpoint (torch_dist)",
        "folder": str(folder),
        "step": dist.iteration,
        "parameters": {"total": sum(math.prod(tensor.shape) for tensor in tensors.values())},
        "dtypes": _dtypes(tensors.values()),
        "optimizer": "yes" if dist.optimizer else "no",
        "args": {name: plain_value(value) for name, value in sorted(dist.args.items())},
        "files": len({path for tensor in tensors.values() for path in tensor.paths}),
        "bytes": sum(tensor.num_bytes for tensor in tensors.values()),
    }


def _describe_adapter(folder: Path) -> dict[str, Any]:
    settings = adapter_settings(folder)
    return {
        "format": f"{settings.get('peft_type') or 'LoRA'} adapter, not whole weights",
        "folder": str(folder),
        "base_model": settings.get("base_model_name_or_path") or "",
        "rank": settings.get("r"),
        "target_modules": settings.get("target_modules"),
    }


def _module(native: str) -> str:
    """The module a parameter is counted under."""
    if native.startswith(("vision.merger.", "vision.deepstack.")):
        return "merger"
    if native.startswith("vision."):
        return "vision"
    parts = {"language.embedding.": "embedding", "language.head.": "head"}
    return next((module for prefix, module in parts.items() if native.startswith(prefix)), "decoder")


def _per_module(tensors: Mapping[str, StoredTensor], modules: Mapping[str, str]) -> dict[str, int]:
    counts = dict.fromkeys(MODULES, 0)
    for name, tensor in tensors.items():
        counts[modules[name]] += math.prod(tensor.shape)
    return counts | {"total": sum(counts.values())}


def _dtypes(tensors: Iterable[StoredTensor]) -> dict[str, int]:
    """Number of tensors of each type."""
    found: dict[str, int] = {}
    for tensor in tensors:
        name = str(tensor.dtype).removeprefix("torch.")
        found[name] = found.get(name, 0) + 1
    return found
