"""A checkpoint of another Megatron stack as one of this stack; a legacy one with its optimizer where there is one."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from megatron_rb.checkpoint.conversion.from_torch_dist import convert_torch_dist
from megatron_rb.checkpoint.conversion.import_hf import (
    checkpoint_json,
    finish_checkpoint,
    key_map,
    write_checkpoint,
)
from megatron_rb.checkpoint.conversion.integrity import check_containers
from megatron_rb.checkpoint.conversion.migrate import check_main_weights, portable_group
from megatron_rb.checkpoint.conversion.options import target_dtype
from megatron_rb.checkpoint.conversion.outcome import Outcome, Summary, files_identity
from megatron_rb.checkpoint.conversion.stream import Job, Progress, Silent, Target, TensorRows, paths_of
from megatron_rb.checkpoint.conversion.workspace import Workspace
from megatron_rb.checkpoint.hf.side_files import copy_side_files
from megatron_rb.checkpoint.hf.table import stored_rules
from megatron_rb.checkpoint.legacy.checkpoint import LegacyCheckpoint, read_legacy
from megatron_rb.checkpoint.legacy.config import derive_config
from megatron_rb.checkpoint.legacy.optimizer import LegacyOptimizer
from megatron_rb.checkpoint.legacy.tree import find_iteration, is_legacy_checkpoint, read_tree
from megatron_rb.checkpoint.manifest import RESEED, SIDE_FOLDER, is_checkpoint
from megatron_rb.checkpoint.megatron_dist.folders import find_megatron_dist
from megatron_rb.checkpoint.storage.tensors import StoredTensor, open_files
from megatron_rb.checkpoint.storage.torch_dist import read_dist_folder
from megatron_rb.config.optimizers import OPTIMIZERS
from megatron_rb.shapes.foreign import foreign_kind, is_adapter
from megatron_rb.shapes.shape import RoboBrainShape, load_shape

MOMENTS = OPTIMIZERS["adamw"].state
GROUP_DEFAULTS = {
    "wd_mult": 1.0,
    "lr_mult": 1.0,
    "is_expert_parallel": False,
    "is_decoupled_lr": False,
    "default_config": False,
}
DEFAULT_SEED = 1234


def convert_megatron(
    checkpoint: str | Path,
    out: str | Path,
    hf: str = "",
    dtype: str = "keep",
    optimizer: bool = True,
    allow_drop: Collection[str] = (),
    progress: Progress | None = None,
) -> Summary:
    """Turn a checkpoint of another Megatron stack into one of this stack, whichever of its formats it has.

    Raises:
        ValueError: it is of none that is read, or as `convert_legacy` and `convert_torch_dist` raise it.
    """
    folder = find_megatron_dist(checkpoint)
    if folder is not None:
        return convert_torch_dist(folder, out, hf, dtype, allow_drop, progress)
    _check_megatron(Path(checkpoint))
    return convert_legacy(checkpoint, out, hf, dtype, optimizer, allow_drop, progress)


def _check_megatron(folder: Path) -> None:
    """Say what a folder is that is of no Megatron stack but known."""
    if is_adapter(folder):
        raise ValueError(f"{folder} {foreign_kind(folder)}")
    if is_checkpoint(folder):
        raise ValueError(f"{folder} is a checkpoint of this stack already; a run continues from it as it is")
    if (folder / "config.json").is_file() and not is_legacy_checkpoint(folder):
        raise ValueError(f"{folder} is a Hugging Face folder; make a checkpoint of it with: rb convert import --hf DIR")


def convert_legacy(
    checkpoint: str | Path,
    out: str | Path,
    hf: str = "",
    dtype: str = "keep",
    optimizer: bool = True,
    allow_drop: Collection[str] = (),
    progress: Progress | None = None,
) -> Summary:
    """Turn a legacy `torch` checkpoint of any tp, pp, uneven first stage and virtual pipeline into one of this stack.

    With an optimizer state the result is a training checkpoint of that iteration, which a run goes on from; without,
    or with `optimizer=False`, it holds the weights only, as of step 0.

    Args:
        checkpoint: the root (its tracker file is followed) or the folder of one iteration.
        hf: Hugging Face folder the checkpoint descends from; empty = a config.json in the checkpoint's own folders, or
            else one derived from its arguments.

    Raises:
        ValueError: ranks are missing or of different checkpoints, the tensors are not those of the model, or `out` is
            taken.
    """
    target_type = target_dtype(dtype)
    with tempfile.TemporaryDirectory(prefix="from-megatron-") as scratch, open_files() as pool:
        side_files = find_config(Path(checkpoint), hf, Path(scratch))
        shape = load_shape(side_files)
        legacy = read_legacy(checkpoint, shape, Path(scratch), allow_drop)
        state = legacy.optimizer if optimizer else None
        targets = legacy_targets(shape, legacy.weights, "", target_type)
        if state is not None:
            for kind, tensors in (("param", state.param), *((name, getattr(state, name)) for name in MOMENTS)):
                targets += legacy_targets(shape, tensors, f"optimizer.state.{kind}.", None)
        files = {path for path in paths_of(targets) if not path.is_relative_to(scratch)}
        identity = {
            "from-megatron": str(legacy.folder.resolve()),
            "dtype": dtype,
            "optimizer": state is not None,
            "files": files_identity(files),
        }
        workspace = Workspace(out, identity)
        outcome = _outcome(legacy, targets, optimizer)
        if side_files.is_relative_to(scratch):
            legacy.warnings.append(
                "config.json was derived from arguments and shapes, and there is no tokenizer: name the Hugging Face "
                "folder when you export"
            )
        job = Job(pool, progress or Silent())
        ranks = read_tree(legacy.folder).ranks.values()
        check_containers([file for rank in ranks for file in (rank.file, rank.optimizer_file) if file], job)
        with workspace.opened(sum(target.num_bytes for target in targets)):
            step = legacy.iteration if state is not None else 0
            manifest = checkpoint_json(step, shape) | ({RESEED: True} if step else {})
            common = training_scalars(legacy, state) if state is not None else {}
            write_checkpoint(workspace, targets, outcome, manifest, common, job)
            copy_side_files(side_files, workspace.folder / SIDE_FOLDER)
            if state is not None:
                written = read_dist_folder(workspace.folder).tensors
                outcome.extra = {**outcome.extra, "main_weights": check_main_weights(written, job)}
            finish_checkpoint(workspace, outcome, job)
    return outcome.summary(out)


def find_config(checkpoint: Path, hf: str, scratch: Path) -> Path:
    """Folder with the config.json of the model: the one named, one of the checkpoint's own, or a derived one."""
    if hf:
        return Path(hf)
    iteration = find_iteration(checkpoint)
    for folder in (iteration, iteration.parent, iteration.parent / SIDE_FOLDER):
        if (folder / "config.json").is_file():
            return folder
    derived = scratch / SIDE_FOLDER
    derived.mkdir()
    (derived / "config.json").write_text(json.dumps(derive_config(read_tree(checkpoint)), indent=2) + "\n")
    return derived


def legacy_targets(shape: RoboBrainShape, tensors: Mapping[str, StoredTensor], prefix: str, dtype: Any) -> list[Target]:
    """What a checkpoint stores of native tensors, in the order of the weight table."""
    return [
        Target(prefix + name, dtype or tensors[name].dtype, rule.stored_shape, (TensorRows.whole(tensors[name]),))
        for name, rule in stored_rules(shape).items()
        if name in tensors
    ]


def training_scalars(legacy: LegacyCheckpoint, state: LegacyOptimizer) -> dict[str, Any]:
    """The scalars of a training checkpoint, as a run of this stack writes them.

    The position in the data cannot be carried over, because the other trainer orders samples in another way.
    """
    groups = [portable_group(GROUP_DEFAULTS | group | {"step": state.step}, "cpu") for group in state.groups]
    for group in groups:
        group.setdefault("max_lr", group.get("lr", 0.0))
        group.setdefault("min_lr", 0.0)
        group.setdefault("weight_decay", 0.0)
    seed = legacy.args.get("seed")
    data = {"seed": seed if isinstance(seed, int) else DEFAULT_SEED, "epoch": 0, "position": 0}
    return {
        "optimizer": {"optimizer": {"param_groups": groups}, "param_state_sharding_type": "fully_reshardable"},
        "parts": {"schedule": {"finished_steps": legacy.iteration}, "data": data},
    }


def _outcome(legacy: LegacyCheckpoint, targets: list[Target], optimizer: bool) -> Outcome:
    dropped = dict(legacy.dropped)
    if legacy.optimizer is not None and not optimizer:
        dropped["optimizer"] = "left out as asked for with --no-optimizer"
    if legacy.optimizer is not None and optimizer:
        dropped["data position"] = (
            f"{legacy.consumed_samples} samples were seen; the data starts from the beginning, because its order was "
            "another trainer's"
        )
    source = {
        "checkpoint": str(legacy.folder.resolve()),
        "iteration": legacy.iteration,
        "release": legacy.is_release,
        "layout": legacy.layout,
        "device_tags": sorted(legacy.device_tags),
        "args": legacy.args,
        "scheduler": legacy.scheduler,
    }
    rng = "not carried over: the states belong to the devices and the layout that wrote them; the run is seeded anew"
    return Outcome("from-megatron", source, {}, key_map(targets), dropped, rng, {"warnings": legacy.warnings})
