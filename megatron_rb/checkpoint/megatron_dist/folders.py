"""The folders of `torch_dist` checkpoints: which iteration is meant, and what its small files say."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rb.checkpoint.legacy.tree import TRACKER
from megatron_rb.checkpoint.storage.restricted import Opaque, UnsafePickle
from megatron_rb.checkpoint.storage.torch_dist import BACKEND, COMMON, DistFolder, read_dist_folder
from megatron_rb.shapes.foreign import is_dist_iteration

_ITERATION = re.compile(r"iter_(\d+)")
_OPTIMIZER = re.compile(r"(chained_\d+\.)?optimizer\.")
RUN_CONFIG = "run_config.yaml"
"""Megatron-Bridge's settings of a run."""
_CENTERED = re.compile(r"^\s*layernorm_zero_centered_gamma:\s*true\b", re.IGNORECASE | re.MULTILINE)


@dataclass(frozen=True)
class MegatronDist:
    """One iteration of a foreign `torch_dist` checkpoint; nothing but descriptions is read."""

    folder: Path
    iteration: int
    stored: DistFolder
    args: Mapping[str, Any]
    """Training arguments by name; empty when there are none."""
    optimizer: tuple[str, ...]
    """Keys of its optimizer's tensors, which are not read."""
    warnings: list[str]

    @property
    def norms_are_centered(self) -> bool:
        """Whether norm weights are stored as gamma - 1."""
        path = self.folder / RUN_CONFIG
        return bool(self.args.get("apply_layernorm_1p")) or (
            path.is_file() and bool(_CENTERED.search(path.read_text(errors="replace")))
        )


def find_megatron_dist(path: str | Path) -> Path | None:
    """The folder of one iteration of a foreign `torch_dist` checkpoint: `path` or what its tracker names.

    None when there is none, or when `path` is a checkpoint of this stack.
    """
    folder = Path(path)
    if is_dist_iteration(folder):
        return folder
    tracker = folder / TRACKER
    word = tracker.read_text().strip() if tracker.is_file() else ""
    chosen = folder / (f"iter_{int(word):07d}" if word.isdigit() else "release")
    return chosen if word and is_dist_iteration(chosen) else None


def read_megatron_dist(folder: Path) -> MegatronDist:
    """Open one iteration.

    Raises:
        ValueError: it is of another format.
        DamagedFile, UnsafePickle: a file cannot be read.
    """
    path = folder / BACKEND
    backend = json.loads(path.read_text()).get("sharded_backend") if path.is_file() else "torch_dist"
    if backend != "torch_dist":
        raise ValueError(f"{folder} is a distributed checkpoint of the format {backend}; torch_dist is read")
    optimizer: list[str] = []

    def is_wanted(name: str) -> bool:
        if _OPTIMIZER.match(name):
            optimizer.append(name)
        return not _OPTIMIZER.match(name)

    stored = read_dist_folder(folder, is_wanted)
    warnings: list[str] = []
    common = _common(stored, warnings)
    args = common.get("args")
    state = args.state if isinstance(args, Opaque) else args
    return MegatronDist(
        folder,
        _iteration(folder, common),
        stored,
        state if isinstance(state, Mapping) else {},
        tuple(optimizer),
        warnings,
    )


def _common(stored: DistFolder, warnings: list[str]) -> Mapping[str, Any]:
    if not stored.has_common:
        return {}
    try:
        tree = stored.read_common()
    except UnsafePickle as error:
        warnings.append(f"{COMMON} was not read, so that sizes are checked against config.json alone: {error}")
        return {}
    return tree if isinstance(tree, Mapping) else {}


def _iteration(folder: Path, common: Mapping[str, Any]) -> int:
    named = _ITERATION.fullmatch(folder.name)
    found = common.get("iteration")
    return int(named[1]) if named else found if isinstance(found, int) else 0
