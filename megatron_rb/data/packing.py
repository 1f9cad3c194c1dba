"""Samples of a step -> micro-batches under two budgets, text tokens and vision patches; pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Budget:
    """What one micro-batch may hold."""

    tokens: int
    patches: int

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.patches < 1:
            raise ValueError(
                f"a micro-batch of {self.tokens} tokens and {self.patches} patches holds nothing; "
                f"seq_length and max_patches must be at least 1"
            )

    @property
    def limits(self) -> np.ndarray:
        return np.array([self.tokens, self.patches], dtype=np.int64)


def plan_step(sizes: np.ndarray, budget: Budget, dp_size: int, micro_batch_multiple: int) -> list[list[list[int]]]:
    """Spread the samples of one step over ranks and micro-batches.

    The number of bins is the smallest multiple of `dp_size * micro_batch_multiple` into which the samples fit; the
    bins are then as even in tokens and in patches as they get. A bin may be empty. Sizes alone decide, so every rank
    computes the same plan.

    Args:
        sizes: int `[samples, 2]`, tokens and patches of each sample.

    Returns:
        For each data-parallel rank its micro-batches, each a list of rows of `sizes` in rising order.

    Raises:
        ValueError: one sample alone is over a budget.
    """
    sizes = np.asarray(sizes, dtype=np.int64).reshape(-1, 2)
    _check(sizes, budget)
    multiple = dp_size * micro_batch_multiple
    filled = np.ceil(sizes.sum(axis=0) / budget.limits).max(initial=0)
    count = multiple * max(1, math.ceil(filled / multiple))
    while True:
        bins = _fill(sizes, budget, count, _evenest) or _fill(sizes, budget, count, _fullest)
        if bins is not None:
            return _deal(bins, sizes, dp_size)
        count += multiple


def _check(sizes: np.ndarray, budget: Budget) -> None:
    over = np.flatnonzero((sizes > budget.limits).any(axis=1))
    if over.size:
        tokens, patches = sizes[over[0]]
        raise ValueError(
            f"a sample of {tokens} tokens and {patches} patches does not fit a micro-batch of {budget.tokens} tokens "
            f"and {budget.patches} patches; raise seq_length or max_patches"
        )


def _scaled(sizes: np.ndarray, bins: int) -> np.ndarray:
    """Sizes as shares of an average bin, so that tokens and patches weigh the same."""
    return sizes / np.maximum(sizes.sum(axis=0) / bins, 1)


Choice = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""(loads of the bins, shares of the sample, bins it fits into) -> one number per such bin; the smallest wins."""


def _evenest(loads: np.ndarray, share: np.ndarray, fits: np.ndarray) -> np.ndarray:
    # How much the sum of squared loads would grow, besides a constant.
    return loads[fits] @ share


def _fullest(loads: np.ndarray, share: np.ndarray, fits: np.ndarray) -> np.ndarray:
    return -loads[fits].sum(axis=1)


def _fill(sizes: np.ndarray, budget: Budget, count: int, choice: Choice) -> list[list[int]] | None:
    """Put the samples, largest first, into `count` bins; None when one finds no place."""
    shares = _scaled(sizes, count)
    used = np.zeros((count, 2), dtype=np.int64)
    loads = np.zeros((count, 2))
    bins: list[list[int]] = [[] for _ in range(count)]
    for item in np.argsort(-shares.max(axis=1, initial=0), kind="stable").tolist():
        fits = np.flatnonzero((used + sizes[item] <= budget.limits).all(axis=1))
        if not fits.size:
            return None
        chosen = int(fits[np.argmin(choice(loads, shares[item], fits))])
        bins[chosen].append(item)
        used[chosen] += sizes[item]
        loads[chosen] += shares[item]
    return bins


def _deal(bins: list[list[int]], sizes: np.ndarray, dp_size: int) -> list[list[list[int]]]:
    """Heaviest bins first, forth and back over the ranks, so that the sums of the ranks are close."""
    shares = _scaled(sizes, len(bins))
    weights = np.array([shares[members].sum() for members in bins])
    ranks: list[list[list[int]]] = [[] for _ in range(dp_size)]
    for turn, number in enumerate(np.argsort(-weights, kind="stable").tolist()):
        lap, rank = divmod(turn, dp_size)
        ranks[rank if lap % 2 == 0 else dp_size - 1 - rank].append(sorted(bins[number]))
    return ranks
