"""Samples of a step -> micro-batches under two budgets, text tokens and vision patches; pure arithmetic.

Two ways to say what a step is: a number of samples, spread over as many micro-batches as they need (`plan_step`), or a
number of micro-batches, filled with as many of the next samples as fit (`fill_step`). Either way the samples of a step
follow each other in the order of the sampler, so that a run resumes from a position alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

EVEN_ENOUGH, EVEN_STILL = 1.02, 1.05
"""Patches of the heaviest micro-batch over the mean: where exchanges end, and what a fuller packing may cost."""

GROUP = 256
"""Most micro-batches that are filled together, and among which samples are exchanged: the time grows as its square."""


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


Choice = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""(loads of the bins, shares of the sample, bins it fits into) -> one number per such bin; the smallest wins."""
Plan = list[list[list[int]]]
"""For each data-parallel rank its micro-batches, each a list of rows of the sizes in rising order."""


def plan_step(sizes: np.ndarray, budget: Budget, dp_size: int, micro_batch_multiple: int) -> Plan:
    """Spread the samples of one step over ranks and micro-batches.

    The number of bins is the smallest multiple of `dp_size * micro_batch_multiple` into which the samples fit; the
    bins are then as even in tokens and in patches as they get. A bin may be empty. Sizes alone decide, so every rank
    computes the same plan.

    Args:
        sizes: int `[samples, 2]`, tokens and patches of each sample.

    Raises:
        ValueError: one sample alone is over a budget.
    """
    sizes = _checked(sizes, budget)
    multiple = dp_size * micro_batch_multiple
    filled = np.ceil(sizes.sum(axis=0) / budget.limits).max(initial=0)
    count = multiple * max(1, math.ceil(filled / multiple))
    while True:
        bins = _fill(sizes, budget, count, _evenest) or _fill(sizes, budget, count, _fullest)
        if bins is not None:
            return _deal(_even_out(bins, sizes), sizes, dp_size)
        count += multiple


def fill_step(sizes: np.ndarray, budget: Budget, dp_size: int, count: int) -> tuple[int, Plan]:
    """Fill `count` micro-batches, a multiple of `dp_size`, with as many of the next samples as fit.

    The samples taken are the first ones, without a gap: nothing is set aside for a later step. Sizes alone decide, so
    every rank computes the same plan.

    Args:
        sizes: int `[samples, 2]` of the next samples in order, enough of them that they do not all fit.

    Returns:
        The number of samples taken, and the plan over them.

    Raises:
        ValueError: one sample alone is over a budget.
    """
    sizes = _checked(sizes, budget)
    taken, bins = 0, []
    for part in np.array_split(np.arange(count), math.ceil(count / GROUP)):
        more, filled = _fill_evenly(sizes[taken:], budget, len(part))
        bins += [[taken + item for item in members] for members in filled]
        taken += more
    return taken, _deal(bins, sizes[:taken], dp_size)


def _fill_evenly(sizes: np.ndarray, budget: Budget, count: int) -> tuple[int, list[list[int]]]:
    """The fullest packing of first samples if it can be made even, else the evenest."""
    taken, bins = _most_packed(sizes, budget, count, _fullest)
    if _unevenness(bins, sizes) > EVEN_STILL:
        taken, bins = _most_packed(sizes, budget, count, _evenest)
    return taken, bins


def _most_packed(sizes: np.ndarray, budget: Budget, count: int, choice: Choice) -> tuple[int, list[list[int]]]:
    """As many first samples as `choice` finds a place for, down in small steps from what the sums allow."""
    taken = max(1, most_that_fit(sizes, budget, count))
    while (bins := _fill(sizes[:taken], budget, count, choice)) is None:
        taken -= max(1, taken // 400)
    return taken, _even_out(bins, sizes[:taken])


def _unevenness(bins: list[list[int]], sizes: np.ndarray) -> float:
    """Patches of the heaviest bin over the mean."""
    patches = np.array([sizes[members, 1].sum() for members in bins])
    return float(patches.max() / max(patches.mean(), 1))


def share_out(work: np.ndarray, ranks: int) -> list[int]:
    """The rank that does each piece of work, `[pieces]`: largest first, each to the rank with the least so far."""
    owners, loads = np.zeros(len(work), dtype=np.int64), np.zeros(ranks, dtype=np.int64)
    for piece in np.argsort(-np.asarray(work), kind="stable").tolist() if ranks > 1 else ():
        owners[piece] = np.argmin(loads)
        # A piece without work counts too, so that equal pieces go round.
        loads[owners[piece]] += max(int(work[piece]), 1)
    return owners.tolist()


def most_that_fit(sizes: np.ndarray, budget: Budget, count: int) -> int:
    """Upper bound for the number of first samples that `count` micro-batches hold: their sums allow no more."""
    return int((np.cumsum(sizes, axis=0) <= budget.limits * count).all(axis=1).sum())


def _checked(sizes: np.ndarray, budget: Budget) -> np.ndarray:
    sizes = np.asarray(sizes, dtype=np.int64).reshape(-1, 2)
    over = np.flatnonzero((sizes > budget.limits).any(axis=1))
    if over.size:
        tokens, patches = sizes[over[0]]
        raise ValueError(
            f"a sample of {tokens} tokens and {patches} patches does not fit a micro-batch of {budget.tokens} tokens "
            f"and {budget.patches} patches; raise seq_length or max_patches"
        )
    return sizes


def _scaled(sizes: np.ndarray, bins: int) -> np.ndarray:
    """Sizes as shares of an average bin, so that tokens and patches weigh the same."""
    return sizes / np.maximum(sizes.sum(axis=0) / bins, 1)


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


def _even_out(bins: list[list[int]], sizes: np.ndarray) -> list[list[int]]:
    """Exchange samples between the bin with most patches and others until it is close to the mean or gains nothing.

    No bin gets more tokens than the fullest one has now, so both budgets stay kept. More than GROUP bins are left as
    they are, since the search would take too long.
    """
    if len(bins) > GROUP:
        return bins
    home = np.zeros(len(sizes), dtype=np.int64)
    for number, members in enumerate(bins):
        home[members] = number
    loads = np.array([sizes[members].sum(axis=0) for members in bins])
    most_tokens, enough = loads[:, 0].max(), EVEN_ENOUGH * loads[:, 1].mean()
    for _ in range(2 * len(bins)):
        heavy = int(np.argmax(loads[:, 1]))
        swap = _best_swap(sizes, home, loads, heavy, most_tokens) if loads[heavy, 1] > enough else None
        if swap is None:
            break
        for item, target in swap:
            loads[home[item]] -= sizes[item]
            loads[target] += sizes[item]
            home[item] = target
    return [np.flatnonzero(home == number).tolist() for number in range(len(bins))]


def _best_swap(
    sizes: np.ndarray, home: np.ndarray, loads: np.ndarray, heavy: int, most_tokens: int
) -> list[tuple[int, int]] | None:
    """The exchange of one sample of bin `heavy` for one sample or nothing of another bin that leaves fewest patches in
    the heavier of the two: pairs of sample and its new bin. None when the heavy bin gains nothing."""
    best, found = int(loads[heavy, 1]), None
    # Rows: every sample as a partner, then every bin for a move without one.
    partners = np.concatenate([sizes, np.zeros_like(loads)])
    places = np.concatenate([home, np.arange(len(loads))])
    for item in np.flatnonzero(home == heavy).tolist():
        gained = sizes[item] - partners
        there, here = loads[places] + gained, loads[heavy] - gained
        allowed = (there[:, 0] <= most_tokens) & (here[:, 0] <= most_tokens) & (places != heavy)
        height = np.where(allowed, np.maximum(there[:, 1], here[:, 1]), best)
        row = int(np.argmin(height))
        if height[row] < best:
            best = int(height[row])
            found = [(item, int(places[row]))] + ([(row, heavy)] if row < len(sizes) else [])
    return found


def _deal(bins: list[list[int]], sizes: np.ndarray, dp_size: int) -> Plan:
    """Heaviest bins first, forth and back over the ranks, so that the sums of the ranks are close."""
    shares = _scaled(sizes, len(bins))
    weights = np.array([shares[members].sum() for members in bins])
    ranks: list[list[list[int]]] = [[] for _ in range(dp_size)]
    for turn, number in enumerate(np.argsort(-weights, kind="stable").tolist()):
        lap, rank = divmod(turn, dp_size)
        ranks[rank if lap % 2 == 0 else dp_size - 1 - rank].append(sorted(bins[number]))
    return ranks
