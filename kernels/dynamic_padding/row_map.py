"""Which row goes where: index lists made on the host, so that nothing has to be asked of the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class RowMap:
    """Output rows and the source rows they take; every row of either side is used at most once.

    So the backward pass is the same movement in the other direction, and no two programs write one row.
    """

    num_rows: int
    """Rows of the output."""
    num_sources: int
    """Rows of the source."""
    index: torch.Tensor
    """int32 `[num_rows]`: the source row of each output row, -1 = none."""
    inverse: torch.Tensor
    """int32 `[num_sources]`: the output row of each source row, -1 = none."""
    rows: torch.Tensor
    """int64: the output rows that take one."""
    sources: torch.Tensor
    """int64: the source row of each of them."""

    @classmethod
    def of(cls, rows: np.ndarray, sources: np.ndarray, num_rows: int, num_sources: int) -> RowMap:
        """Output row `rows[i]` takes source row `sources[i]`.

        Raises:
            ValueError: the lists differ in length, leave the range, or name a row twice.
        """
        rows, sources = np.asarray(rows, dtype=np.int64), np.asarray(sources, dtype=np.int64)
        if rows.shape != sources.shape or rows.ndim != 1:
            raise ValueError(f"rows has shape {rows.shape} and sources {sources.shape}; both must be of one length")
        _check("rows", rows, num_rows)
        _check("sources", sources, num_sources)
        index, inverse = _inverted(rows, sources, num_rows), _inverted(sources, rows, num_sources)
        return cls(num_rows, num_sources, *map(torch.from_numpy, (index, inverse, rows, sources)))

    def of_rows(self, rows: np.ndarray) -> RowMap:
        """What some of the output rows take, in the order given."""
        origin = self.index.numpy()[rows]
        taking = np.flatnonzero(origin >= 0)
        return RowMap.of(taking, origin[taking], len(rows), self.num_sources)

    def reversed(self) -> RowMap:
        """The same movement in the other direction."""
        return RowMap(self.num_sources, self.num_rows, self.inverse, self.index, self.sources, self.rows)

    def to(self, device: torch.device, non_blocking: bool = False) -> RowMap:
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> RowMap:
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> RowMap:
        changed: dict[str, Any] = {
            name: change(getattr(self, name)) for name in ("index", "inverse", "rows", "sources")
        }
        return replace(self, **changed)


def unpacking(lengths: Sequence[int], longest: int) -> RowMap:
    """From sequences one after the other to rows of `longest` places each; `reversed()` packs them again.

    Raises:
        ValueError: a sequence is longer than `longest`.
    """
    over = max(lengths, default=0)
    if over > longest:
        raise ValueError(f"longest is {longest}; it must hold every sequence, and one has {over} rows")
    places = [number * longest + np.arange(length) for number, length in enumerate(lengths)]
    rows = np.concatenate(places) if places else np.zeros(0, dtype=np.int64)
    return RowMap.of(rows, np.arange(len(rows)), len(lengths) * longest, len(rows))


def padding(num_rows: int, padded_rows: int) -> RowMap:
    """From `num_rows` rows to `padded_rows`, zeros at the end; `reversed()` takes them off again."""
    if padded_rows < num_rows:
        raise ValueError(f"padded_rows is {padded_rows}; it must be at least the {num_rows} rows there are")
    return RowMap.of(np.arange(num_rows), np.arange(num_rows), padded_rows, num_rows)


def _inverted(places: np.ndarray, values: np.ndarray, size: int) -> np.ndarray:
    table = np.full(size, -1, dtype=np.int32)
    table[places] = values
    return table


def _check(name: str, places: np.ndarray, size: int) -> None:
    outside = places[(places < 0) | (places >= size)]
    if outside.size:
        raise ValueError(f"{name} names row {outside[0]}; it must be one of 0..{size - 1}")
    repeated = np.flatnonzero(np.bincount(places, minlength=1) > 1)
    if repeated.size:
        raise ValueError(f"{name} names row {repeated[0]} twice; every row may be used once")
