"""The adapters of a checkpoint as a folder of peft."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_rb.checkpoint.conversion.export_hf import native_tensors
from megatron_rb.checkpoint.conversion.files import WRITING, write_safetensors
from megatron_rb.checkpoint.conversion.import_hf import key_map
from megatron_rb.checkpoint.conversion.options import target_dtype
from megatron_rb.checkpoint.conversion.outcome import Outcome, Summary, check_written, files_identity
from megatron_rb.checkpoint.conversion.stream import Job, Progress, Silent, Target, TensorRows, paths_of
from megatron_rb.checkpoint.conversion.workspace import Workspace
from megatron_rb.checkpoint.hf.adapters import PREFIX, WEIGHTS, adapters_of_manifest, describe, factor_rules
from megatron_rb.checkpoint.hf.in_full import trained_in_full
from megatron_rb.checkpoint.hf.table import WeightRule, stored_rules
from megatron_rb.checkpoint.manifest import (
    check_same_model,
    find_checkpoint,
    find_side_files,
    holds_adapters,
    read_manifest,
)
from megatron_rb.checkpoint.storage.safetensors_files import read_safetensors
from megatron_rb.checkpoint.storage.tensors import StoredTensor, open_files
from megatron_rb.checkpoint.storage.torch_dist import read_dist_folder
from megatron_rb.models.adapters.plan import Adapter
from megatron_rb.shapes.foreign import ADAPTER_CONFIG
from megatron_rb.shapes.shape import RoboBrainShape, load_shape, model_fingerprint


@dataclass(frozen=True)
class AdapterCheckpoint:
    """A checkpoint that holds adapters, and what it says of them."""

    folder: Path
    side_files: Path
    shape: RoboBrainShape
    adapters: tuple[Adapter, ...]
    in_full: tuple[str, ...]
    """Patterns of the modules that were trained in full."""
    digest: str
    """Of the base weights."""
    base: str
    """Folder of the base weights, as the run named it."""


def open_adapter_checkpoint(checkpoint: str | Path, hf: str = "") -> AdapterCheckpoint:
    """Find a checkpoint and read what it says of its adapters.

    Raises:
        ValueError: there is none, or it holds whole weights.
    """
    source = find_checkpoint(checkpoint)
    manifest = read_manifest(source)
    if not holds_adapters(manifest):
        raise ValueError(
            f"{source} holds whole weights and no adapters; make a Hugging Face folder of it with: "
            f"rb convert export --ckpt {source} --out DIR"
        )
    side_files = find_side_files(source, hf)
    shape = load_shape(side_files)
    model = manifest["model"]
    own = {name: model[name] for name in ("base", "adapters", "train_in_full")}
    check_same_model(manifest, model_fingerprint(shape) | own, source)
    adapters = adapters_of_manifest(model, shape)
    base = manifest.get("base_folder", "")
    return AdapterCheckpoint(source, side_files, shape, adapters, tuple(model["train_in_full"]), model["base"], base)


def export_adapter(
    checkpoint: str | Path,
    out: str | Path,
    hf: str = "",
    dtype: str = "keep",
    name: str = "",
    progress: Progress | None = None,
) -> Summary:
    """Write an adapter of a checkpoint as peft does.

    Args:
        name: which of several; empty = the only one.

    Raises:
        ValueError: the checkpoint has no adapters, or several and none is named; `out` is taken.
    """
    opened = open_adapter_checkpoint(checkpoint, hf)
    adapter = _named(opened, name)
    targets = _targets(opened, adapter, dtype)
    identity = {"export": str(opened.folder.resolve()), "adapter": adapter.name, "dtype": dtype}
    workspace = Workspace(out, identity | {"files": files_identity(paths_of(targets))})
    outcome = Outcome("export-adapter", {"checkpoint": str(opened.folder.resolve())}, {}, key_map(targets))
    outcome.extra = {"base": opened.digest}
    num_bytes = sum(target.num_bytes for target in targets)
    with open_files() as pool, workspace.opened(num_bytes):
        job = Job(pool, progress or Silent())
        job.progress.total(WRITING, num_bytes)
        outcome.records = workspace.write_files({WEIGHTS: partial(write_safetensors, targets=targets, job=job)}, job)
        full = {
            target.name.removeprefix(PREFIX).rpartition(".")[0] for target in targets if ".lora_" not in target.name
        }
        config = describe(adapter, opened.base, sorted(full), opened.shape)
        (workspace.folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        with workspace.discarded_when_wrong():
            check_written(read_safetensors(workspace.folder / WEIGHTS), outcome, job)
        outcome.write(workspace.folder)
        workspace.publish()
    return outcome.summary(out)


def _named(opened: AdapterCheckpoint, name: str) -> Adapter:
    names = [adapter.name for adapter in opened.adapters]
    if not name and len(names) > 1:
        raise ValueError(f"{opened.folder} holds the adapters {', '.join(names)}; name one with --adapter")
    if name and name not in names:
        raise ValueError(f"{opened.folder} holds no adapter {name}; it holds {', '.join(names)}")
    return opened.adapters[names.index(name) if name else 0]


def _targets(opened: AdapterCheckpoint, adapter: Adapter, dtype: str) -> list[Target]:
    """Factors, then the tensors that were trained in full, as rows of the checkpoint's."""
    target_type, stored = target_dtype(dtype), read_dist_folder(opened.folder).tensors
    factors = factor_rules(adapter, opened.shape)
    whole = trained_in_full(opened.in_full, opened.shape)
    full = {name: rule for name, rule in stored_rules(opened.shape).items() if name in whole}
    targets = []
    for rules, prefix in ((factors, ""), (full, PREFIX)):
        natives = native_tensors(stored, rules, opened.folder)
        for name, rule in rules.items():
            targets += _of_rule(rule, natives[name], prefix, target_type)
    return targets


def _of_rule(rule: WeightRule, native: StoredTensor, prefix: str, dtype: Any) -> list[Target]:
    return [
        Target(
            prefix + name,
            dtype or native.dtype,
            size,
            tuple(TensorRows(native, start, count) for _, start, count in rule.rows_of(source)),
        )
        for source, (name, size) in enumerate(zip(rule.hf_names, rule.hf_shapes, strict=True))
    ]
