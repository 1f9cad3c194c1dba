"""The form of a capture on disk.

`step_00000001/` holds for every rank `rank_00000.safetensors` (the kept pieces of tensors) and `rank_00000.json` (which
rows and columns of which tensor each piece is, hashes of samples and weights); `capture.json` is written last and says
what was run. Nothing in it is a pickle. A tensor is named `<what>/<sample>/<block>/<point>`, `what` being `value` or
`grad`; weights are `weight/<parameter>`, their rows are output features.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_rb.checkpoint.storage.safetensors_files import safetensors_header

DESCRIPTION = "capture.json"
VERSION = 1

Columns = list[tuple[int, int]]
"""Ranges of global columns (start, length) that lie beside each other in a piece."""


class RankFile:
    """Takes the pieces of one rank as they come; memory holds one at a time.

    Args:
        folder: of the step; `finish` makes the files appear in it.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder = folder
        self.rank = rank
        self.entries: dict[str, dict[str, Any]] = {}
        self.samples: dict[str, dict[str, Any]] = {}
        self.weights: dict[str, dict[str, str]] = {}
        self.problem = ""
        """Why nothing is written any more."""
        self._kinds: list[tuple[str, torch.dtype, tuple[int, ...]]] = []
        self._path = folder / f"rank_{rank:05d}.pieces"
        with self._given_up_on_error():
            folder.mkdir(parents=True, exist_ok=True)
            self._path.touch()

    def add(self, name: str, piece: torch.Tensor, rows: np.ndarray, columns: Columns | None) -> None:
        """Append a piece.

        Args:
            piece: `[rows, columns]` on the CPU.
            rows: offset of each row in its sample, or output feature of each row of a weight.
            columns: None = all columns of the tensor.
        """
        if name in self.entries or self.problem:
            return
        piece = piece.contiguous()
        self.entries[name] = {"rows": rows.tolist(), "columns": columns}
        self._kinds.append((name, piece.dtype, tuple(piece.shape)))
        with self._given_up_on_error(), self._path.open("ab") as pieces:
            pieces.write(piece.view(torch.uint8).numpy().data)

    def finish(self) -> None:
        """Put the header before the pieces; the files are complete when they have their names."""
        if self.problem:
            return
        target = self.folder / f"rank_{self.rank:05d}.safetensors"
        partial = target.with_suffix(".partial")
        with self._given_up_on_error():
            with partial.open("wb") as out, self._path.open("rb") as pieces:
                out.write(safetensors_header(self._kinds))
                shutil.copyfileobj(pieces, out, 1 << 22)
            content = {"tensors": self.entries, "samples": self.samples, "weights": self.weights}
            write_json(target.with_suffix(".json"), content)
            os.replace(partial, target)
            self._path.unlink()

    def abandon(self) -> None:
        """Leave nothing behind."""
        for path in self.folder.glob(f"rank_{self.rank:05d}.*"):
            path.unlink(missing_ok=True)

    @contextmanager
    def _given_up_on_error(self) -> Iterator[None]:
        """A run must not end because its disk is full."""
        try:
            yield
        except OSError as error:
            self.problem = str(error)
            with suppress(OSError):
                self.abandon()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content))
    os.replace(partial, path)


def step_folder(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}"
