"""Boxes of tensors as arithmetic: the ones that consecutive elements fill, where two meet, and even shares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class TensorBox:
    """A rectangular part of a tensor."""

    start: tuple[int, ...]
    """Index of its first element."""
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def overlap(self, other: TensorBox) -> TensorBox | None:
        """What lies in both, None when they do not meet."""
        start = tuple(map(max, self.start, other.start))
        stops = (min(a, b) for a, b in zip(self._stop(), other._stop(), strict=True))
        shape = tuple(stop - low for low, stop in zip(start, stops, strict=True))
        return TensorBox(start, shape) if all(size > 0 for size in shape) else None

    def seen_from(self, origin: Sequence[int]) -> TensorBox:
        """The same box counted from an index `origin`."""
        return TensorBox(tuple(a - b for a, b in zip(self.start, origin, strict=True)), self.shape)

    def slices(self) -> tuple[slice, ...]:
        """Index that takes the box out of its tensor."""
        return tuple(slice(low, low + size) for low, size in zip(self.start, self.shape, strict=True))

    def _stop(self) -> tuple[int, ...]:
        return tuple(low + size for low, size in zip(self.start, self.shape, strict=True))


def strides_of(shape: Sequence[int]) -> tuple[int, ...]:
    """Elements between neighbours of each dimension of a contiguous tensor."""
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def place_of(index: Sequence[int], shape: Sequence[int]) -> int:
    """Number of an element, counted in row-major order."""
    return sum(i * step for i, step in zip(index, strides_of(shape), strict=True))


def boxes_of_run(shape: tuple[int, ...], first: int, stop: int) -> list[TensorBox]:
    """Fewest boxes, in order, that hold the elements `first` to `stop` of a tensor in row-major order.

    They are the end of a row, whole rows, and the beginning of a row: at most 2n - 1 for n dimensions.
    """
    if first >= stop:
        return []
    if not shape:
        return [TensorBox((), ())]
    row = math.prod(shape[1:])
    low, high = -(-first // row), stop // row
    if low > high:
        return _in_row(shape, high, first - high * row, stop - high * row)
    boxes = _in_row(shape, low - 1, first - (low - 1) * row, row) if first < low * row else []
    if low < high:
        boxes.append(TensorBox((low, *[0] * (len(shape) - 1)), (high - low, *shape[1:])))
    return boxes + _in_row(shape, high, 0, stop - high * row)


def _in_row(shape: tuple[int, ...], row: int, first: int, stop: int) -> list[TensorBox]:
    return [TensorBox((row, *box.start), (1, *box.shape)) for box in boxes_of_run(shape[1:], first, stop)]


@dataclass(frozen=True)
class Segment:
    """Consecutive elements of one of several tensors, and the part that they belong to."""

    tensor: int
    first: int
    stop: int
    part: int


def cut_evenly(sizes: Sequence[int], parts: int) -> list[Segment]:
    """The elements of tensors, one after the other, cut into parts of equal length (but for one element)."""
    total, before, segments = sum(sizes), 0, []
    bounds = [total * part // parts for part in range(parts + 1)]
    part = 0
    for tensor, size in enumerate(sizes):
        first = 0
        while first < size:
            while bounds[part + 1] <= before + first:
                part += 1
            stop = min(size, bounds[part + 1] - before)
            segments.append(Segment(tensor, first, stop, part))
            first = stop
        before += size
    return segments
