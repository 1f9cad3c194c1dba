"""Balanced choice of hop pairs: equal over 25 score bins, inside each over 4 gap bins, with 5 % zero hops.

Source: Robo-Dopamine (arXiv 2512.23703), balanced sampling; its released generator for the sizes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_rb.value.hops import hop_labels

SCORE_BINS = 25
"""Over -100 .. 100 %, each 8 % wide."""
GAP_BINS = 4
"""Over the distances 1 .. n - 2 between two of n states; the one distance n - 1 counts as the longest."""
POOL_FACTOR, LARGEST_POOL = 100, 100_000
"""Candidates drawn per wanted pair, and at most per episode."""
CENTRE_OUT = np.argsort(np.abs(np.arange(SCORE_BINS) - SCORE_BINS // 2), kind="stable")
ZERO_RULES = ("paper", "released")


@dataclass(frozen=True)
class PairRules:
    """How many pairs an episode gives and which."""

    pairs_per_episode: int = 1000
    zero_share: float = 0.05
    """Share of the pairs whose label is zero."""
    zero_rule: str = "paper"
    """`paper`: a frame within 10 % of the distance between the neighbouring states and within `zero_epsilon` of
    progress. `released`: 7.5 % of it, but at least one frame, however much progress that frame is."""
    zero_epsilon: float = 0.05
    """Largest difference of progress that `paper` takes for none; the paper's own number is not published."""

    def __post_init__(self) -> None:
        if self.pairs_per_episode < 1 or not 0 <= self.zero_share <= 1:
            raise ValueError(
                f"{self.pairs_per_episode} pairs with a zero share of {self.zero_share:g}; give at least 1 pair and a "
                f"share from 0 to 1"
            )
        if self.zero_rule not in ZERO_RULES:
            raise ValueError(f"zero rule '{self.zero_rule}' is not known; use {' or '.join(ZERO_RULES)}")


@dataclass(frozen=True)
class HopPairs:
    """Pairs of frames of one episode; all arrays have one entry per pair."""

    before: np.ndarray
    """Frame numbers."""
    after: np.ndarray
    hop: np.ndarray
    """Label in [-1, 1]."""
    progress: np.ndarray
    """[pairs, 2]: Phi of both states."""

    def __len__(self) -> int:
        return len(self.hop)


def episode_generator(seed: int, episode: str, purpose: str = "") -> np.random.Generator:
    """Random numbers that depend on (seed, episode id, purpose) alone: on no other episode, process or salted hash."""
    words = np.frombuffer(hashlib.sha256(f"{episode}\0{purpose}".encode()).digest(), dtype="<u4")
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, *words.tolist()])))


def sample_pairs(states: Sequence[int], rules: PairRules, rng: np.random.Generator) -> HopPairs:
    """Distinct pairs of an episode in random order; fewer than asked for when it has no more.

    Args:
        states: frame numbers s_0 .. s_M, rising.
    """
    frames = np.asarray(states, dtype=np.int64)
    num_zero = int(rng.binomial(rules.pairs_per_episode, rules.zero_share))
    before, after, hop = balanced_pairs(len(frames), rules.pairs_per_episode - num_zero, rng)
    if len(hop) < rules.pairs_per_episode - num_zero:
        num_zero = min(num_zero, int(np.rint(len(hop) * rules.zero_share / max(1 - rules.zero_share, 1e-9))))
    zero_states, zero_frames = zero_pairs(frames, num_zero, rules, rng)
    phi = np.arange(len(frames)) / (len(frames) - 1)
    first = np.concatenate([frames[before], frames[zero_states]])
    second = np.concatenate([frames[after], zero_frames])
    order = rng.permutation(len(first))
    first, second = first[order], second[order]
    label = np.concatenate([hop, np.zeros(len(zero_states))])[order]
    both = np.interp(np.stack([first, second], axis=-1), frames, phi)
    return HopPairs(first, second, label, both)


def balanced_pairs(num_states: int, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """At most `count` distinct pairs of different states (before, after, label), as evenly spread as possible.

    Every score bin gets an equal quota, what is left over goes to the central bins; inside a bin the same over the gap
    bins, what is left over to the fullest. What a bin lacks is shared out again over those that have more.
    """
    before, after = _candidates(num_states, count, rng)
    hop = hop_labels(before, after, num_states)
    score = np.minimum(((hop + 1.0) * (SCORE_BINS / 2)).astype(np.int64), SCORE_BINS - 1)
    gap = np.minimum((np.abs(after - before) - 1) * GAP_BINS // max(num_states - 2, 1), GAP_BINS - 1)
    cell = (score * GAP_BINS + gap).astype(np.uint8)
    order = np.argsort(cell, kind="stable")
    sizes = np.bincount(cell, minlength=SCORE_BINS * GAP_BINS)
    chosen = _first_of_each(order, sizes, cell_quotas(sizes.reshape(SCORE_BINS, GAP_BINS), count).ravel())
    return before[chosen], after[chosen], hop[chosen]


def cell_quotas(sizes: np.ndarray, count: int) -> np.ndarray:
    """How many pairs to take from every cell.

    Args:
        sizes: int [score bins, gap bins], candidates per cell.
    """
    quotas = np.zeros_like(sizes)
    for row, quota in enumerate(share_out(sizes.sum(axis=1), count, CENTRE_OUT)):
        if quota:
            quotas[row] = share_out(sizes[row], int(quota), np.argsort(-sizes[row], kind="stable"))
    return quotas


def share_out(available: np.ndarray, total: int, order: np.ndarray) -> np.ndarray:
    """Split `total` into equal parts, none larger than what is available; odd ones go to the first in `order`.

    The same as handing out one after the other, round by round in `order`, leaving out those who have run dry.
    """
    given = np.zeros_like(available)
    left = min(int(total), int(available.sum()))
    while left:
        waiting = order[given[order] < available[order]]
        part = left // len(waiting)
        if part:
            extra = np.minimum(part, available[waiting] - given[waiting])
            given[waiting] += extra
            left -= int(extra.sum())
        else:
            given[waiting[:left]] += 1
            left = 0
    return given


def zero_pairs(
    frames: np.ndarray, count: int, rules: PairRules, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """`count` states with replacement and beside each a frame that shows no progress.

    Returns:
        State numbers [count], frame numbers [count]; the frame is the state's own where no other is near enough.
    """
    last = len(frames) - 1
    states = rng.integers(0, last, count, endpoint=True)
    window = frames[np.minimum(states + 1, last)] - frames[np.maximum(states - 1, 0)]
    sign = np.where(rng.random(count) < 0.5, -1, 1)
    # At both ends of the episode there is only one side.
    sign = np.where(states == 0, 1, np.where(states == last, -1, sign))
    if rules.zero_rule == "released":
        return states, frames[states] + sign * np.maximum(1, (0.075 * window).astype(np.int64))
    reach = np.minimum(0.1 * window, rules.zero_epsilon * _frames_per_progress(frames, states, sign))
    offset = np.floor(rng.random(count) * (np.floor(reach) + 1)).astype(np.int64)
    return states, frames[states] + sign * offset


def _frames_per_progress(frames: np.ndarray, states: np.ndarray, sign: np.ndarray) -> np.ndarray:
    """Length in frames of one whole unit of progress, at the pace beside each state."""
    last = len(frames) - 1
    return np.abs(frames[np.clip(states + sign, 0, last)] - frames[states]) * float(last)


def _candidates(num_states: int, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of different states in random order: all, or a pool drawn from all when there are very many."""
    population = num_states * (num_states - 1)
    pool = min(POOL_FACTOR * count, LARGEST_POOL)
    if population <= pool:
        numbers = rng.permutation(population)
    else:
        drawn = np.sort(rng.integers(0, population, pool))
        numbers = rng.permutation(drawn[np.append(True, drawn[1:] != drawn[:-1])])
    before, after = np.divmod(numbers, num_states - 1)
    return before, after + (after >= before)


def _first_of_each(order: np.ndarray, sizes: np.ndarray, quotas: np.ndarray) -> np.ndarray:
    """The first `quotas[c]` members of each group c; `order` holds the groups one after the other."""
    starts = np.cumsum(sizes) - sizes
    within = np.arange(int(quotas.sum())) - np.repeat(np.cumsum(quotas) - quotas, quotas)
    return order[np.repeat(starts, quotas) + within]
