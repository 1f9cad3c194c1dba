"""Captures as they are read back: whole tensors from the pieces of all ranks, in fp64, one at a time."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_rb.capture.files import DESCRIPTION, VERSION
from megatron_rb.checkpoint.storage.safetensors_files import read_safetensors

ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Largest relative error of rounding to a type."""


@dataclass(frozen=True)
class Table:
    """Kept rows of a tensor, or kept output features of a weight."""

    values: np.ndarray
    """float64 `[rows, columns]`"""
    rows: np.ndarray
    """Offset of each row in its sample, rising."""
    dtype: torch.dtype
    """What it was computed in."""

    @property
    def roundoff(self) -> float:
        return ROUNDOFF[self.dtype]

    def at(self, rows: np.ndarray) -> Table:
        """Only these rows; all of them must be there."""
        if np.array_equal(rows, self.rows):
            return self
        places = np.searchsorted(self.rows, rows)
        return Table(self.values[places], rows, self.dtype)


@dataclass(frozen=True)
class _Piece:
    path: Path
    position: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    rows: list[int]
    columns: list[tuple[int, int]] | None

    @property
    def width(self) -> int:
        """Columns of the whole tensor as far as this piece knows."""
        return max(start + length for start, length in self.columns) if self.columns else self.shape[1]


class Capture:
    """One captured step of one run."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.name = name
        self.description: dict[str, Any] = json.loads((folder / DESCRIPTION).read_text())
        if self.description["version"] != VERSION:
            raise ValueError(f"{folder} is a capture of form {self.description['version']}, this rb reads {VERSION}")
        self.samples: dict[str, dict[str, Any]] = {}
        self.weights: dict[str, dict[str, str]] = {}
        self._pieces: dict[str, list[_Piece]] = defaultdict(list)
        for rank in range(self.description["world_size"]):
            self._read_index(rank)

    @property
    def sample_names(self) -> list[str]:
        return self.description["samples"]

    @property
    def tp_size(self) -> int:
        return self.description["layout"]["tp_size"]

    @property
    def about(self) -> str:
        """Platform, device, type and layout, as far as the capture knows them."""
        platform, layout = self.description.get("platform", {}), self.description["layout"]
        degrees = [f"{axis} {layout[f'{axis}_size']}" for axis in ("tp", "pp", "dp") if f"{axis}_size" in layout]
        known = (platform.get("platform"), platform.get("device"), self.description["dtype"], *degrees)
        return ", ".join(str(word) for word in known if word)

    def names(self) -> set[str]:
        """Names of all tensors that were kept of any sample."""
        return set(self._pieces)

    def read(self, name: str) -> Table | None:
        """A tensor in fp64; None when it was not kept.

        Raises:
            ValueError: pieces of it are missing.
        """
        pieces = self._pieces.get(name)
        if not pieces:
            return None
        if len(pieces) == 1 and pieces[0].columns is None:
            return Table(_load(pieces[0]), np.array(pieces[0].rows, dtype=np.int64), pieces[0].dtype)
        rows = np.unique(np.concatenate([piece.rows for piece in pieces])).astype(np.int64)
        width = max(piece.width for piece in pieces)
        values = np.full((len(rows), width), np.nan)
        filled = np.zeros((len(rows), width), dtype=bool)
        for piece in pieces:
            _place(piece, rows, values, filled)
        if not filled.all():
            raise ValueError(f"{self.folder}: pieces of {name} are missing; copy the files of all ranks")
        return Table(values, rows, pieces[0].dtype)

    def _read_index(self, rank: int) -> None:
        path = self.folder / f"rank_{rank:05d}.safetensors"
        if not path.is_file() or not path.with_suffix(".json").is_file():
            raise ValueError(f"{path} (or its .json) is missing; copy the files of all ranks of the capture")
        index = json.loads(path.with_suffix(".json").read_text())
        for name, stored in read_safetensors(path).items():
            entry = index["tensors"][name]
            position = stored.chunks[0].position
            piece = _Piece(path, position, stored.dtype, stored.shape, entry["rows"], entry["columns"])
            self._pieces[name].append(piece)
        for sample, facts in index["samples"].items():
            known = self.samples.setdefault(sample, facts)
            known["pixels"] = known["pixels"] or facts["pixels"]
        self.weights |= index["weights"]


def open_captures(a: Path, b: Path, step: int = 0) -> tuple[Capture, Capture]:
    """The captures of one step in two folders.

    Args:
        a, b: a captured step, a folder of captured steps, or a run folder.
        step: 0 = the first one that both have.

    Raises:
        ValueError: there is no complete capture, or none of the same step.
    """
    found = [_steps_in(path) for path in (a, b)]
    both = sorted(found[0].keys() & found[1].keys())
    if not both or (step and step not in both):
        listed = [f"{path} has {sorted(steps) or 'none'}" for path, steps in zip((a, b), found, strict=True)]
        wanted = f"step {step}" if step else "one step"
        raise ValueError(
            f"the captures have not {wanted} in common: {', '.join(listed)}; capture the same step of both"
        )
    chosen = step or both[0]
    return Capture(found[0][chosen], str(a)), Capture(found[1][chosen], str(b))


def _steps_in(folder: Path) -> dict[int, Path]:
    """Complete captures by step."""
    if not folder.is_dir():
        raise ValueError(f"{folder} does not exist; give the folder of a capture (`rb compare capture` makes one)")
    files = [
        *folder.glob(DESCRIPTION),
        *folder.glob(f"step_*/{DESCRIPTION}"),
        *folder.glob(f"captures/step_*/{DESCRIPTION}"),
    ]
    return {json.loads(file.read_text())["step"]: file.parent for file in files}


def check_same_input(a: Capture, b: Capture) -> None:
    """Raises ValueError when the captures are of different models, batches or weights, or keep different parts."""
    left, right = a.description["model"], b.description["model"]
    if left != right:
        parts = ", ".join(part for part in left if left[part] != right.get(part))
        raise ValueError(f"the captures are of different models: {parts} differ; capture one recipe on both sides")
    _check_settings(a, b)
    if a.sample_names != b.sample_names:
        raise ValueError(
            f"the captures are of different batches: {a.name} kept the samples {a.sample_names}, {b.name} "
            f"{b.sample_names}; capture the same step with the same data and seed"
        )
    for name in a.sample_names:
        for part, what in (("text", "tokens or labels"), ("pixels", "pixels")):
            if a.samples[name][part] != b.samples[name][part]:
                raise ValueError(
                    f"the captures are of different batches: the {what} of sample {name!r} differ (their hashes are "
                    f"{a.samples[name][part]} and {b.samples[name][part]}); prepare the data once and copy it"
                )
    _check_weights(a, b)


def _check_settings(a: Capture, b: Capture) -> None:
    left, right = (side.description["settings"] for side in (a, b))
    unequal = [f"metrics.capture.{name} ({left[name]} and {right[name]})" for name in left if left[name] != right[name]]
    if unequal:
        raise ValueError(f"the captures keep different parts: {', '.join(unequal)} differ; use the same on both sides")


def _check_weights(a: Capture, b: Capture) -> None:
    unequal = []
    for name in sorted(a.weights.keys() | b.weights.keys()):
        left, right = a.weights.get(name), b.weights.get(name)
        if left is None or right is None:
            unequal.append(name)
            continue
        kind = "hash" if left["dtype"] == right["dtype"] else "bf16_hash"
        if left[kind] != right[kind]:
            unequal.append(name)
    if unequal:
        raise ValueError(
            f"the captures are of different weights: {len(unequal)} of {len(a.weights)} parameters differ, first "
            f"{unequal[0]}; start both from one checkpoint and capture the first step after it"
        )


def _place(piece: _Piece, rows: np.ndarray, values: np.ndarray, filled: np.ndarray) -> None:
    block = _load(piece)
    places = np.searchsorted(rows, piece.rows)
    start = 0
    for first, length in piece.columns or [(0, piece.shape[1])]:
        values[places, first : first + length] = block[:, start : start + length]
        filled[places, first : first + length] = True
        start += length


def _load(piece: _Piece) -> np.ndarray:
    raw = bytearray(math.prod(piece.shape) * piece.dtype.itemsize)
    with piece.path.open("rb") as file:
        file.seek(piece.position)
        if file.readinto(raw) != len(raw):
            raise ValueError(f"{piece.path} is cut off; copy it again")
    if not raw:
        return np.zeros(piece.shape)
    return torch.frombuffer(raw, dtype=piece.dtype).view(piece.shape).double().numpy()


def common_rows(tables: Sequence[Table]) -> np.ndarray:
    """Rows that all tables have."""
    rows = tables[0].rows
    for table in tables[1:]:
        rows = np.intersect1d(rows, table.rows, assume_unique=True)
    return rows
