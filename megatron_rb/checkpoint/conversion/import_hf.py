"""A Hugging Face folder as a checkpoint of step 0 that opens under any layout."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_rb.checkpoint.conversion.files import WRITING, write_dist_file, written_chunks
from megatron_rb.checkpoint.conversion.integrity import check_containers
from megatron_rb.checkpoint.conversion.options import target_dtype
from megatron_rb.checkpoint.conversion.outcome import (
    Outcome,
    Summary,
    check_written,
    files_identity,
    known_checksums,
    versions,
)
from megatron_rb.checkpoint.conversion.stream import (
    Job,
    Progress,
    Silent,
    Target,
    TensorRows,
    paths_of,
    plan_files,
    sources_of,
)
from megatron_rb.checkpoint.conversion.workspace import Workspace
from megatron_rb.checkpoint.hf.folder import EMBEDDING, Matched, find_tensors, match_tensors
from megatron_rb.checkpoint.hf.side_files import copy_side_files
from megatron_rb.checkpoint.hf.table import WeightRule, stored_rules
from megatron_rb.checkpoint.hf.tied import check_tied
from megatron_rb.checkpoint.manifest import FORMAT, SIDE_FOLDER
from megatron_rb.checkpoint.manifest import MANIFEST as CHECKPOINT
from megatron_rb.checkpoint.storage.restricted import read_torch_file
from megatron_rb.checkpoint.storage.tensors import StoredTensor, open_files
from megatron_rb.checkpoint.storage.torch_dist import Blob, read_dist_folder, write_dist_metadata
from megatron_rb.shapes.shape import RoboBrainShape, load_shape, model_fingerprint

FILE_BYTES = 1 << 30
"""Size of a finished piece of work: what a stopped conversion loses at most, per thread."""


def import_folder(
    hf: str | Path,
    out: str | Path,
    dtype: str = "keep",
    allow_drop: Collection[str] = (),
    progress: Progress | None = None,
) -> Summary:
    """Turn a Hugging Face folder into a checkpoint of step 0 that holds weights only.

    Args:
        dtype: `keep`, or the type all weights are converted to.
        allow_drop: tensors of the folder, by name or pattern of names, that may be left out.

    Raises:
        ValueError: the folder is no RoboBrain model, its tensors are not those of its config.json, or `out` is taken.
    """
    hf, target_type = Path(hf), target_dtype(dtype)
    shape = load_shape(hf)
    matched = match_tensors(hf, find_tensors(hf), shape, allow_drop)
    targets = import_targets(shape, matched, target_type)
    identity = {"import": str(hf.resolve()), "dtype": dtype, "files": files_identity(paths_of(targets))}
    workspace = Workspace(out, identity)
    with open_files() as pool:
        job = Job(pool, progress or Silent(), known=known_checksums(hf))
        pickled = [path for path in paths_of(targets) if path.suffix != ".safetensors"]
        check_containers([read_torch_file(path) for path in pickled], job)
        check_tied(hf, matched.tensors[EMBEDDING], matched.head_copy, pool)
        source = {"folder": str(hf.resolve())}
        outcome = Outcome(
            "import", source, {}, key_map(targets), matched.dropped, extra={"warnings": dequantised(matched)}
        )
        with workspace.opened(sum(target.num_bytes for target in targets)):
            write_checkpoint(workspace, targets, outcome, checkpoint_json(0, shape), {}, job)
            copy_side_files(hf, workspace.folder / SIDE_FOLDER)
            finish_checkpoint(workspace, outcome, job)
    return outcome.summary(out)


def import_targets(shape: RoboBrainShape, matched: Matched, dtype: torch.dtype | None) -> list[Target]:
    """What a checkpoint of the model stores, as rows of the folder's tensors."""
    return [
        joined_target(name, rule, [matched.tensors[hf_name] for hf_name in rule.hf_names], dtype)
        for name, rule in stored_rules(shape).items()
    ]


def joined_target(name: str, rule: WeightRule, sources: Sequence[StoredTensor], dtype: torch.dtype | None) -> Target:
    """A native parameter as rows of the Hugging Face tensors that it is made of."""
    pieces = tuple(TensorRows(sources[run.source], run.start, run.count) for run in rule.runs)
    types = {source.value_dtype for source in sources}
    if len(types) > 1 and dtype is None:
        raise ValueError(
            f"{name} is made of tensors of different types ({', '.join(sorted(map(str, types)))}); "
            "choose one with --dtype"
        )
    return Target(name, dtype or types.pop(), rule.stored_shape, pieces)


def dequantised(matched: Matched) -> list[str]:
    """The note on tensors that are multiplied with their block scales; empty when there are none."""
    scaled = [tensor for tensor in matched.tensors.values() if tensor.scales is not None]
    if not scaled:
        return []
    return [f"{len(scaled)} fp8 tensors were multiplied with their block scales in fp32, e.g. {scaled[0].name}"]


def checkpoint_json(step: int, shape: RoboBrainShape) -> dict[str, Any]:
    """The content of `checkpoint.json` of converted weights."""
    info = {"platform": "converter", **versions()}
    return {"format": FORMAT, "step": step, "model": model_fingerprint(shape), "layout": {}, "platform": info}


def write_checkpoint(
    workspace: Workspace,
    targets: list[Target],
    outcome: Outcome,
    manifest: dict[str, Any],
    common: Any,
    job: Job,
    objects: Mapping[str, Blob] | None = None,
) -> None:
    """Write tensors, table of contents and `checkpoint.json` into the workspace."""
    files = {f"__0_{number}.distcp": group for number, group in enumerate(plan_files(targets, FILE_BYTES))}
    job.progress.total(WRITING, sum(target.num_bytes for target in targets))
    for name in workspace.finished.keys() & files.keys():
        job.progress.advance(WRITING, sum(target.num_bytes for target in files[name]))
    writers = {name: partial(write_dist_file, targets=group, job=job) for name, group in files.items()}
    outcome.records = workspace.write_files(writers, job)
    forms = {target.name: (target.dtype, target.shape) for target in targets}
    write_dist_metadata(workspace.folder, forms, written_chunks(outcome.records), objects or {}, common)
    (workspace.folder / CHECKPOINT).write_text(json.dumps(manifest, indent=2))


def finish_checkpoint(workspace: Workspace, outcome: Outcome, job: Job) -> None:
    """Read the new checkpoint again, compare, and publish it."""
    with workspace.discarded_when_wrong():
        check_written(read_dist_folder(workspace.folder).tensors, outcome, job)
    outcome.write(workspace.folder)
    workspace.publish()


def key_map(targets: Sequence[Target]) -> dict[str, list[str]]:
    """Names of the sources of every target."""
    return {target.name: [tensor.name for tensor in sources_of(target)] for target in targets}
