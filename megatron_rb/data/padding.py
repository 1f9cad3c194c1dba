"""Dynamic unified padding: to which sizes the micro-batches of a step are padded, so that memory blocks are reused.

A caching allocator keeps a block for every size it has seen. When each step has its own sizes the blocks of one step do
not fit the next, and memory that is free cannot be used. Following the RoboBrain 2.5 report, the first step is padded
to the largest micro-batch the data can give and later ones to a few sizes below it; only a micro-batch above all
earlier ones makes the allocator start again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Size:
    """Rows of a micro-batch, of text and of vision (images and video alike)."""

    tokens: int
    patches: int

    def __str__(self) -> str:
        return f"{self.tokens} tokens and {self.patches} patches"


@dataclass(frozen=True)
class PaddingPlan:
    """What one step is padded to."""

    sizes: tuple[Size, ...]
    """For each micro-batch; the same on every rank."""
    outgrown: Size | None = None
    """The largest size so far, when a micro-batch of this step is above it: cached memory is to be given back first."""


NO_PADDING = PaddingPlan(())


class PaddingPolicy:
    """Sizes for the steps of a run, in order; the same answers on every rank that asks the same questions.

    Args:
        largest: the largest micro-batch that is expected, see `largest_micro_batch`.
        multiple: what tokens and patches are a multiple of.
        num_buckets: sizes of each kind between nothing and the largest.
    """

    def __init__(self, largest: Size, multiple: Size, num_buckets: int) -> None:
        if num_buckets < 1 or min(multiple.tokens, multiple.patches) < 1:
            raise ValueError(f"num_buckets {num_buckets} and multiple {multiple} must be at least 1")
        self._multiple = multiple
        self._num_buckets = num_buckets
        self.expected = self._rounded(largest)
        self.largest = self.expected
        self._started = False

    def plan(self, sizes: Sequence[Size]) -> PaddingPlan:
        """Sizes for the next step.

        Args:
            sizes: for each micro-batch number of the step its largest size over the data-parallel ranks.
        """
        needed = self._rounded(
            Size(max((s.tokens for s in sizes), default=0), max((s.patches for s in sizes), default=0))
        )
        before, outgrown = self.largest, None
        if needed.tokens > before.tokens or needed.patches > before.patches:
            self.largest = Size(max(needed.tokens, before.tokens), max(needed.patches, before.patches))
            outgrown = before
        # The blocks are made at the largest size: in the first step, and again when that size has grown.
        if not self._started or outgrown is not None:
            self._started = True
            return PaddingPlan((self.largest,) * len(sizes), outgrown)
        return PaddingPlan(tuple(self._bucket_of(size, self.largest) for size in sizes))

    def bucket(self, size: Size) -> Size:
        """The smallest bucket that holds a size, whatever `plan` has seen; a size above the largest is only rounded."""
        return self._bucket_of(size, self.expected)

    def restart(self) -> None:
        """Treat the next step as the first: the process has no blocks yet."""
        self._started = False

    def _bucket_of(self, size: Size, largest: Size) -> Size:
        return Size(
            self._bucket(size.tokens, largest.tokens, self._multiple.tokens),
            self._bucket(size.patches, largest.patches, self._multiple.patches),
        )

    def _bucket(self, rows: int, largest: int, multiple: int) -> int:
        step = _up(-(-largest // self._num_buckets), multiple)
        wanted = _up(max(rows, 1), step)
        # The last bucket ends at the largest size, not above it.
        return min(wanted, largest) if rows <= largest else _up(rows, multiple)

    def _rounded(self, size: Size) -> Size:
        return Size(_up(max(size.tokens, 1), self._multiple.tokens), _up(max(size.patches, 1), self._multiple.patches))


def largest_micro_batch(sizes: np.ndarray, budget: Size, samples_per_step: int) -> Size:
    """An upper bound for the micro-batches of a data set: the largest samples of one step, within the budget.

    Args:
        sizes: int `[samples, 2]`, tokens and patches of each sample.
    """
    table = np.asarray(sizes, dtype=np.int64).reshape(-1, 2)
    biggest = np.sort(table, axis=0)[::-1][:samples_per_step].sum(axis=0)
    return Size(min(budget.tokens, int(biggest[0])), min(budget.patches, int(biggest[1])))


def plan_sizes(sizes: np.ndarray, plan: Sequence[Sequence[Sequence[int]]]) -> tuple[Size, ...]:
    """For each micro-batch number its largest tokens and patches over the ranks of a `packing.plan_step`."""
    table = np.asarray(sizes, dtype=np.int64).reshape(-1, 2)
    sums = np.array([[table[list(members)].sum(axis=0) for members in rank] for rank in plan])
    return tuple(Size(int(tokens), int(patches)) for tokens, patches in sums.max(axis=0))


def fragmentation(allocated: int | None, reserved: int | None) -> float | None:
    """Share of the memory the allocator holds that no tensor uses; None where the platform cannot know."""
    if allocated is None or not reserved:
        return None
    return 1.0 - allocated / reserved


def _up(rows: int, multiple: int) -> int:
    return rows + -rows % multiple
