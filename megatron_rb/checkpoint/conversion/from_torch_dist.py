"""The weights of another megatron-core stack's `torch_dist` checkpoint as a checkpoint of this stack."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch

from megatron_rb.checkpoint.conversion.import_hf import (
    checkpoint_json,
    finish_checkpoint,
    joined_target,
    key_map,
    write_checkpoint,
)
from megatron_rb.checkpoint.conversion.integrity import check_containers
from megatron_rb.checkpoint.conversion.options import target_dtype
from megatron_rb.checkpoint.conversion.outcome import Outcome, Summary, files_identity
from megatron_rb.checkpoint.conversion.stream import Job, Progress, Silent, Target, TensorRows, paths_of
from megatron_rb.checkpoint.conversion.workspace import Workspace
from megatron_rb.checkpoint.hf.side_files import copy_side_files
from megatron_rb.checkpoint.hf.table import WeightRule, stored_rules
from megatron_rb.checkpoint.legacy.arguments import plain_value
from megatron_rb.checkpoint.manifest import SIDE_FOLDER
from megatron_rb.checkpoint.megatron_dist.folders import MegatronDist, read_megatron_dist
from megatron_rb.checkpoint.megatron_dist.weights import FoundWeights, find_weights
from megatron_rb.checkpoint.storage.tensors import open_files
from megatron_rb.shapes.shape import RoboBrainShape, load_shape


def convert_torch_dist(
    folder: Path,
    out: str | Path,
    hf: str = "",
    dtype: str = "keep",
    allow_drop: Collection[str] = (),
    progress: Progress | None = None,
) -> Summary:
    """Turn the weights of one iteration of any layout into a checkpoint of step 0; its optimizer state is left out.

    Args:
        folder: the folder of the iteration, with `.metadata`.
        hf: Hugging Face folder the model descends from; empty = a config.json in or beside the iteration.

    Raises:
        ValueError: the tensors are not those of the model, there is no config.json, or `out` is taken.
    """
    target_type, side_files = target_dtype(dtype), _config_folder(folder, hf)
    shape, dist = load_shape(side_files), read_megatron_dist(folder)
    with open_files() as pool:
        job = Job(pool, progress or Silent())
        found = find_weights(dist, shape, pool, allow_drop)
        targets = _targets(shape, found, target_type)
        identity = {
            "from-megatron": str(folder.resolve()),
            "dtype": dtype,
            "files": files_identity(paths_of(targets)),
        }
        workspace = Workspace(out, identity)
        check_containers(dist.stored.blobs_of(found.keys & dist.stored.tensors.keys()), job)
        outcome = _outcome(dist, found, targets)
        with workspace.opened(sum(target.num_bytes for target in targets)):
            write_checkpoint(workspace, targets, outcome, checkpoint_json(0, shape), {}, job)
            copy_side_files(side_files, workspace.folder / SIDE_FOLDER)
            finish_checkpoint(workspace, outcome, job)
    return outcome.summary(out)


def _config_folder(folder: Path, hf: str) -> Path:
    if hf:
        return Path(hf)
    for place in (folder, folder.parent, folder.parent / SIDE_FOLDER):
        if (place / "config.json").is_file():
            return place
    raise ValueError(
        f"{folder} is a distributed checkpoint (torch_dist) without a config.json; name the Hugging Face folder that "
        "its model descends from with --hf"
    )


def _targets(shape: RoboBrainShape, found: FoundWeights, dtype: torch.dtype | None) -> list[Target]:
    return [_target(name, rule, found, dtype) for name, rule in stored_rules(shape).items()]


def _target(name: str, rule: WeightRule, found: FoundWeights, dtype: torch.dtype | None) -> Target:
    if name in found.native:
        tensor = found.native[name]
        return Target(name, dtype or tensor.dtype, rule.stored_shape, (TensorRows.whole(tensor),))
    return joined_target(name, rule, [found.hf[hf_name] for hf_name in rule.hf_names], dtype)


def _outcome(dist: MegatronDist, found: FoundWeights, targets: list[Target]) -> Outcome:
    source = {
        "checkpoint": str(dist.folder.resolve()),
        "format": "torch_dist",
        "iteration": dist.iteration,
        "args": {name: plain_value(value) for name, value in dist.args.items()},
    }
    rng = "not carried over: the states belong to the devices and the layout that wrote them; the run is seeded anew"
    return Outcome("from-megatron", source, {}, key_map(targets), found.dropped, rng, {"warnings": dist.warnings})
