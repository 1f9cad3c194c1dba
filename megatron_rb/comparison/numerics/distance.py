"""How far the two sides are apart at a point: relative differences and units in the last place."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_rb.capture.points import Point
from megatron_rb.comparison.numerics.captures import Table, common_rows
from megatron_rb.comparison.numerics.definitions import BlockView

Views = Sequence[tuple[BlockView, BlockView]]
"""A block of every kept sample, as A and as B have it."""
ULP_EDGES = (0.5, 1.5, 4.5, 16.5, 256.5)
ULP_LABELS = ("0", "1", "2-4", "5-16", "17-256", "more")


@dataclass(frozen=True)
class PointResult:
    """Outputs and gradients of one point on both sides."""

    block: str
    point: str
    relative: float
    """Root mean square of the difference over that of A."""
    grad_relative: float
    """NaN where no gradient was kept."""
    largest: float
    """Largest absolute difference over the largest absolute value of A."""
    ulps: tuple[int, ...]
    """Values by their distance in units in the last place of the coarser type; see ULP_LABELS."""


def measure(views: Views, block: str, point: Point) -> PointResult | None:
    """None when a side kept nothing of it."""
    values = Distance.over(_pairs(views, lambda view: view.point(point.name)), with_ulps=True)
    if values is None:
        return None
    grads = Distance.over(_pairs(views, lambda view: view.grad(point.name)), with_ulps=False)
    return PointResult(
        block,
        point.name,
        values.relative,
        grads.relative if grads else math.nan,
        values.largest,
        tuple(values.ulps.tolist()),
    )


def _pairs(views: Views, read: Callable[[BlockView], Table | None]) -> Iterator[tuple[Table, Table]]:
    """What both sides kept of each sample, in the same rows."""
    for view_a, view_b in views:
        a, b = read(view_a), read(view_b)
        if a is not None and b is not None:
            rows = common_rows([a, b])
            yield a.at(rows), b.at(rows)


@dataclass
class Distance:
    """Sums over the samples of one point."""

    squares: float = 0.0
    of_a: float = 0.0
    most: float = 0.0
    scale: float = 0.0
    ulps: np.ndarray = field(default_factory=lambda: np.zeros(len(ULP_LABELS), dtype=np.int64))

    @classmethod
    def over(cls, pairs: Iterable[tuple[Table, Table]], with_ulps: bool) -> Distance | None:
        """None when nothing was kept."""
        total, empty = cls(), True
        for a, b in pairs:
            total._add(a.values, b.values, max(a.roundoff, b.roundoff) if with_ulps else 0.0)
            empty = False
        return None if empty else total

    @property
    def relative(self) -> float:
        """Root mean square of the difference over that of A; infinite for values that are not finite."""
        if not math.isfinite(self.squares):
            return math.inf
        return math.sqrt(self.squares / self.of_a) if self.of_a else (math.inf if self.squares else 0.0)

    @property
    def largest(self) -> float:
        return self.most / self.scale if self.scale else 0.0

    def _add(self, a: np.ndarray, b: np.ndarray, roundoff: float) -> None:
        difference = np.abs(a - b)
        self.squares += float(np.vdot(difference, difference))
        self.of_a += float(np.vdot(a, a))
        self.most = max(self.most, float(difference.max(initial=0)))
        self.scale = max(self.scale, float(np.abs(a).max(initial=0)))
        if roundoff:
            self.ulps += ulp_counts(a, b, difference, roundoff)


def ulp_counts(a: np.ndarray, b: np.ndarray, difference: np.ndarray, roundoff: float) -> np.ndarray:
    """Values by their distance in units in the last place; see ULP_LABELS. What is no number counts as far apart.

    Args:
        difference: absolute difference of a and b.
        roundoff: of the type whose units are counted.
    """
    if not difference.any():
        return np.array([difference.size] + [0] * (len(ULP_LABELS) - 1))
    largest = np.maximum(np.abs(a), np.abs(b))
    # The unit of a value is 2 ** floor(log2) times twice the round-off: its exponent bits alone.
    unit = (largest.view(np.int64) & np.int64(0x7FF0_0000_0000_0000)).view(np.float64) * (2 * roundoff)
    below = [int(np.count_nonzero(difference <= edge * unit)) for edge in ULP_EDGES]
    return np.diff([0, *below, difference.size])
