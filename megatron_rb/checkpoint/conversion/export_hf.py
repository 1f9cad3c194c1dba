"""A checkpoint of any layout as a Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

from megatron_rb.checkpoint.conversion.files import WRITING, write_safetensors
from megatron_rb.checkpoint.conversion.import_hf import key_map
from megatron_rb.checkpoint.conversion.integrity import check_containers
from megatron_rb.checkpoint.conversion.options import parse_size, target_dtype
from megatron_rb.checkpoint.conversion.outcome import Outcome, Summary, check_written, files_identity, known_checksums
from megatron_rb.checkpoint.conversion.stream import (
    Job,
    Progress,
    Silent,
    Target,
    TensorRows,
    paths_of,
    plan_files,
)
from megatron_rb.checkpoint.conversion.workspace import Workspace
from megatron_rb.checkpoint.hf.folder import find_tensors
from megatron_rb.checkpoint.hf.names import exported_name, shard_name
from megatron_rb.checkpoint.hf.side_files import copy_side_files, write_config
from megatron_rb.checkpoint.hf.table import WeightRule, stored_rules
from megatron_rb.checkpoint.manifest import check_same_model, find_checkpoint, find_side_files, read_manifest
from megatron_rb.checkpoint.storage.tensors import StoredTensor, open_files
from megatron_rb.checkpoint.storage.torch_dist import read_dist_folder
from megatron_rb.shapes.shape import RoboBrainShape, load_shape, model_fingerprint

INDEX = "model.safetensors.index.json"


def export_checkpoint(
    checkpoint: str | Path,
    out: str | Path,
    hf: str = "",
    dtype: str = "keep",
    max_shard_size: str = "5GB",
    progress: Progress | None = None,
) -> Summary:
    """Turn a checkpoint of any layout into a Hugging Face folder.

    Args:
        checkpoint: a checkpoint, the folder of a run's checkpoints, or the run's folder; of several the newest.
        hf: folder to take config, tokenizer and processor files from; empty = those kept with the checkpoint.

    Raises:
        ValueError: there is no checkpoint, it is of another model, its files are unknown, or `out` is taken.
    """
    target_type, max_bytes = target_dtype(dtype), parse_size(max_shard_size)
    source = find_checkpoint(checkpoint)
    side_files = find_side_files(source, hf)
    shape = load_shape(side_files)
    check_same_model(read_manifest(source), model_fingerprint(shape), source)
    stored = read_dist_folder(source)
    targets = export_targets(shape, native_tensors(stored.tensors, stored_rules(shape), source), target_type)
    shards = plan_files(targets, max_bytes)
    files = {shard_name(index, len(shards)): group for index, group in enumerate(shards)}
    identity = {
        "export": str(source.resolve()),
        "dtype": dtype,
        "shards": list(files),
        "side files": str(side_files.resolve()),
        "files": files_identity(paths_of(targets)),
    }
    workspace = Workspace(out, identity)
    outcome = Outcome("export", {"checkpoint": str(source.resolve())}, {}, key_map(targets))
    num_bytes = sum(target.num_bytes for target in targets)
    with open_files() as pool, workspace.opened(num_bytes):
        job = Job(pool, progress or Silent(), known=known_checksums(source))
        # The checksum of a manifest is compared on the way; a container's own would cost one more pass over the source.
        check_containers(stored.blobs_of(stored_rules(shape).keys() - job.known.keys()), job)
        job.progress.total(WRITING, num_bytes)
        for name in workspace.finished:
            job.progress.advance(WRITING, sum(target.num_bytes for target in files[name]))
        writers = {name: partial(write_safetensors, targets=group, job=job) for name, group in files.items()}
        outcome.records = workspace.write_files(writers, job)
        folder = workspace.folder
        copy_side_files(side_files, folder)
        write_index(folder, outcome)
        write_config(side_files / "config.json", folder / "config.json", {target.dtype for target in targets})
        with workspace.discarded_when_wrong():
            check_written(find_tensors(folder), outcome, job)
        outcome.write(folder)
        workspace.publish()
    return outcome.summary(out)


def model_tensors(checkpoint: Path, shape: RoboBrainShape) -> dict[str, StoredTensor]:
    """The model's parameters in a checkpoint, in their full native shapes.

    Raises:
        ValueError: a parameter is missing or has another shape.
    """
    return native_tensors(read_dist_folder(checkpoint).tensors, stored_rules(shape), checkpoint)


def native_tensors(
    stored: Mapping[str, StoredTensor], rules: Mapping[str, WeightRule], origin: Path, prefix: str = ""
) -> dict[str, StoredTensor]:
    """Tensors under `prefix` + name for every rule, fused parts below each other."""
    lacking = sorted(name for name in rules if prefix + name not in stored)
    if lacking:
        raise ValueError(f"{origin} lacks {len(lacking)} parameters of its model, e.g. {', '.join(lacking[:3])}")
    found = {}
    for name, rule in rules.items():
        tensor = stored[prefix + name]
        if tensor.shape != rule.stored_shape:
            raise ValueError(f"{name} has the shape {tensor.shape} in {origin}, its model needs {rule.stored_shape}")
        found[name] = tensor if rule.parts == 1 else tensor.with_fused_rows()
    return found


def export_targets(
    shape: RoboBrainShape, tensors: Mapping[str, StoredTensor], dtype: torch.dtype | None
) -> list[Target]:
    """The tensors of a Hugging Face folder, as rows of the checkpoint's."""
    targets = []
    for name, rule in stored_rules(shape).items():
        native = tensors[name]
        for source, (hf_name, hf_shape) in enumerate(zip(rule.hf_names, rule.hf_shapes, strict=True)):
            pieces = tuple(TensorRows(native, start, count) for _, start, count in rule.rows_of(source))
            targets.append(Target(exported_name(hf_name, shape.family), dtype or native.dtype, hf_shape, pieces))
    return targets


def write_index(folder: Path, outcome: Outcome) -> None:
    """The index of several shards; a single file needs none."""
    if len(outcome.records) == 1:
        return
    summary = outcome.summary(folder)
    places = {name: file for file, record in outcome.records.items() for name in record["tensors"]}
    totals = {"total_parameters": summary.num_parameters, "total_size": summary.num_bytes}
    index = {"metadata": totals, "weight_map": dict(sorted(places.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
