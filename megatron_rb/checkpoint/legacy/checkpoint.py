"""A whole legacy checkpoint under this stack's names, as pieces of its files."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_rb.checkpoint.hf.table import stored_rules
from megatron_rb.checkpoint.legacy.arguments import check_arguments, plain_value
from megatron_rb.checkpoint.legacy.layers import Dropped, find_sites
from megatron_rb.checkpoint.legacy.norms import raise_by_one
from megatron_rb.checkpoint.legacy.optimizer import LegacyOptimizer, read_optimizer
from megatron_rb.checkpoint.legacy.reading import Reading
from megatron_rb.checkpoint.legacy.tree import LegacyTree, read_tree
from megatron_rb.checkpoint.legacy.weights import join_weights
from megatron_rb.checkpoint.storage.tensors import StoredTensor, open_files
from megatron_rb.shapes.shape import RoboBrainShape

_READ = {"args", "iteration", "opt_param_scheduler", "lr_scheduler", "optimizer"}
_NEEDLESS = {
    "checkpoint_version": "version of the legacy format",
    "rng_state": "random states of the devices and the layout that wrote it; the run is seeded anew",
    "rerun_state_machine": "state of Megatron's fault detection",
    "content_metadata": "description of the legacy format",
    "num_floating_point_operations_so_far": "a statistic",
    "tokens": "a statistic",
}
"""Entries of a rank's file that are left out."""


@dataclass(frozen=True)
class LegacyCheckpoint:
    """What a legacy checkpoint holds; tensors are pieces of its files and nothing is loaded."""

    folder: Path
    """The iteration's folder."""
    iteration: int
    is_release: bool
    """Converted from elsewhere and not trained."""
    layout: dict[str, int]
    """`tp`, `pp` and `virtual_chunks` it was written under."""
    args: dict[str, Any]
    """Training arguments as plain values."""
    weights: dict[str, StoredTensor]
    """By native name, global and unpadded, in the type of the files; tied embeddings once."""
    optimizer: LegacyOptimizer | None
    scheduler: dict[str, Any] | None
    """State of Megatron's learning-rate schedule; its `num_steps` counts samples."""
    consumed_samples: int
    """Training samples seen so far."""
    dropped: Dropped
    """`(key, reason)` of everything in the files that is in none of the fields above."""
    warnings: list[str]
    device_tags: frozenset[str]
    """Devices that the files name."""


def read_legacy(
    path: str | Path, shape: RoboBrainShape, scratch: Path | None = None, allow_drop: Collection[str] = ()
) -> LegacyCheckpoint:
    """Read a legacy `torch` checkpoint of any tp, pp, virtual pipeline and uneven stages.

    Args:
        path: the checkpoint's root (its tracker file is followed) or the folder of one iteration.
        shape: the model, from the `config.json` of the Hugging Face folder it descends from.
        scratch: a folder for norm weights that are stored as gamma - 1; must live as long as the result is used.
        allow_drop: keys of the model's state dict that may be left out though they are unknown.

    Raises:
        ValueError: ranks are missing or of different checkpoints, or the tensors are not those of the model.
        UnsafePickle, DamagedFile: a file cannot be read.
    """
    tree = read_tree(path)
    warnings = check_arguments(tree, shape)
    sites, dropped = find_sites(tree, allow_drop)
    with open_files() as pool:
        reading = Reading(tree, sites, stored_rules(shape), shape.text.tied_embeddings, pool, dropped, warnings)
        weights, optimizer = join_weights(reading), read_optimizer(reading)
        if tree.first.args.get("apply_layernorm_1p"):
            weights, optimizer = _with_plain_norms(reading, weights, optimizer, scratch)
    dropped += _needless_entries(tree)
    return LegacyCheckpoint(
        folder=tree.folder,
        iteration=tree.iteration,
        is_release=tree.is_release,
        layout={"tp": tree.tp_size, "pp": tree.pp_size, "virtual_chunks": tree.num_chunks},
        args={name: plain_value(value) for name, value in tree.first.args.items()},
        weights=weights,
        optimizer=optimizer,
        scheduler=_scheduler(tree),
        consumed_samples=int(tree.first.args.get("consumed_train_samples") or 0),
        dropped=dropped,
        warnings=warnings,
        device_tags=tree.device_tags(),
    )


def _with_plain_norms(
    reading: Reading, weights: dict[str, StoredTensor], optimizer: LegacyOptimizer | None, scratch: Path | None
) -> tuple[dict[str, StoredTensor], LegacyOptimizer | None]:
    """Norms of the language model with one added; FlagScale and Pai never store the vision tower's as gamma - 1."""
    if scratch is None:
        raise ValueError("the checkpoint stores norm weights as gamma - 1 (apply_layernorm_1p); name a scratch folder")
    norms = [site.native for site in reading.sites if site.parameter.is_norm and site.native.startswith("language.")]
    raised, largest = raise_by_one({name: weights[name] for name in norms}, scratch / "norms.bin", reading.pool)
    reading.warnings.append(
        f"{len(norms)} norm weights of the language model were stored as gamma - 1: one was added in fp32, rounding "
        f"moved them by at most {largest:.3g}"
    )
    if optimizer:
        centered = {name: tensor for name, tensor in optimizer.param.items() if name in norms}
        main, _ = raise_by_one(centered, scratch / "main_norms.bin", reading.pool)
        optimizer = replace(optimizer, param=optimizer.param | main)
    return weights | raised, optimizer


def _scheduler(tree: LegacyTree) -> dict[str, Any] | None:
    state = tree.first.tree.get("opt_param_scheduler", tree.first.tree.get("lr_scheduler"))
    return None if state is None else plain_value(state)


def _needless_entries(tree: LegacyTree) -> Dropped:
    dropped: Dropped = []
    for rank in tree.ranks.values():
        used = _READ | {rank.chunk_name(chunk) for chunk in range(len(rank.chunks))}
        for key in rank.tree.keys() - used:
            entry = (str(key), _NEEDLESS.get(key, "an entry whose meaning is not known; no weight or optimizer state"))
            if entry not in dropped:
                dropped.append(entry)
    return sorted(dropped)
