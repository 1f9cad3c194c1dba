"""Micro-batches as the cost model sees them, and the drawing of random ones from a histogram."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from megatron_rb.planner.histogram import Histogram

T = TypeVar("T")
Pack = Callable[[np.ndarray, int, int, int, int], list[list[list[int]]]]
"""(sizes `[samples, 2]` in tokens and patches, token and patch budget, ranks, multiple) -> micro-batches of ranks."""


@dataclass(frozen=True)
class MicroBatches:
    """Sizes of micro-batches, arrays of one shape (any)."""

    tokens: np.ndarray
    """Of the language model, image tokens included."""
    pairs: np.ndarray
    """Sum of squared sample lengths: attention between tokens of the same sample, before the causal mask."""
    patches: np.ndarray
    frame_pairs: np.ndarray
    """Pairs of patches of the same frame."""
    labels: np.ndarray
    """Rows that reach the head: at most the text tokens, which is what is assumed."""
    samples: np.ndarray

    def of_context_rank(self, cp_size: int, frame_patches: np.ndarray | float = 0.0) -> MicroBatches:
        """What the context-parallel rank with the most has of each: an even part of the tokens and of causal attention,
        and of the patches, where a rank that has some has whole frames.

        Args:
            frame_patches: patches of a usual frame.
        """
        if cp_size == 1:
            return self
        patches = np.maximum(self.patches / cp_size, np.minimum(frame_patches, self.patches))
        share = patches / np.maximum(self.patches, 1)
        return MicroBatches(
            self.tokens / cp_size,
            self.pairs / cp_size,
            patches,
            self.frame_pairs * share,
            self.labels / cp_size,
            self.samples,
        )

    def mean(self) -> MicroBatches:
        """The average micro-batch, arrays of one entry."""
        return MicroBatches(*(np.array([values.mean()]) for values in vars(self).values()))


@dataclass(frozen=True)
class MicroBatchLimits:
    """Limits of one micro-batch."""

    tokens: int
    patches: int


def draw_micro_batches(
    histogram: Histogram,
    merge_unit: int,
    budget: MicroBatchLimits,
    samples: int,
    ranks: int,
    multiple: int,
    steps: int,
    pack: Pack,
    seed: int,
) -> MicroBatches:
    """Random steps, packed as training packs them.

    Args:
        samples: samples of a step on all `ranks` together.
        multiple: the number of micro-batches of a rank is a multiple of it.

    Returns:
        Arrays `[steps * ranks, micro-batches]`; steps with fewer micro-batches end in empty ones.
    """
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(steps):
        bins = histogram.draw(samples, random)
        columns = sample_columns(histogram, merge_unit, bins)
        sizes = columns[[0, 2]].T.astype(np.int64)
        for rank in pack(sizes, budget.tokens, budget.patches, ranks, multiple):
            rows.append([columns[:, members].sum(axis=1) for members in rank])
    most = max(map(len, rows))
    table = np.zeros((len(rows), most, 6))
    for number, row in enumerate(rows):
        table[number, : len(row)] = row
    return MicroBatches(*np.moveaxis(table, 2, 0))


def sample_columns(histogram: Histogram, merge_unit: int, bins: np.ndarray) -> np.ndarray:
    """The fields of `MicroBatches` for single samples, float64 `[fields, samples]`."""
    tokens, patches = histogram.tokens(merge_unit)[bins], histogram.patches[bins]
    pairs, frames = tokens.astype(np.float64) ** 2, patches * histogram.frame_patches[bins]
    return np.stack([tokens, pairs, patches, frames, histogram.text_tokens[bins], np.ones(len(bins))])


MOST_MICRO_BATCHES = 48
"""Micro-batches of a rank that are drawn; a longer step is extrapolated."""


@dataclass(frozen=True)
class Drawn:
    """Micro-batches of some ranks in some steps."""

    batches: MicroBatches
    """Arrays `[draws, micro-batches]`, without padding."""
    num_micro_batches: int
    """Of a rank in a step; at least as many as are drawn."""
    ranks: int
    """Ranks of each drawn step; the draws of a step lie together."""

    def padded(self, largest: MicroBatchLimits, buckets: int) -> MicroBatches:
        """What is computed when micro-batches are padded to `buckets` sizes up to the largest: every rank pads its n-th
        micro-batch to the largest n-th one. Padding is a segment of its own. 0 buckets = no padding.
        """
        if not buckets:
            return self.batches
        real = self.batches
        tokens, patches = (
            self._bucketed(values, limit, buckets)
            for values, limit in ((real.tokens, largest.tokens), (real.patches, largest.patches))
        )
        pairs = real.pairs + (tokens - real.tokens) ** 2
        frame_pairs = real.frame_pairs + (patches - real.patches) ** 2
        return MicroBatches(tokens, pairs, patches, frame_pairs, real.labels, real.samples)

    def _bucketed(self, values: np.ndarray, largest: int, buckets: int) -> np.ndarray:
        steps = values.reshape(-1, self.ranks, values.shape[1]).max(axis=1, keepdims=True)
        size = -(-largest // buckets)
        rows = np.minimum(np.maximum(np.ceil(steps / max(size, 1)), 1) * size, largest)
        return np.broadcast_to(rows, (len(steps), self.ranks, values.shape[1])).reshape(values.shape)


class MicroBatchSampler:
    """Draws the micro-batches of a layout once and hands out the same ones again.

    Args:
        pack: the packing that training uses.
        most_ranks: data-parallel ranks that are drawn; more are extrapolated from these.
        most_samples: samples that are drawn for a step; fewer ranks are drawn when one has many.
    """

    def __init__(
        self,
        histogram: Histogram,
        merge_unit: int,
        global_batch_size: int,
        pack: Pack,
        *,
        steps: int = 2,
        most_ranks: int = 8,
        most_samples: int = 512,
        seed: int = 0,
    ) -> None:
        self.histogram = histogram
        self.merge_unit = merge_unit
        self.global_batch_size = global_batch_size
        self._pack, self._steps, self._seed = pack, steps, seed
        self._most_ranks, self._most_samples = most_ranks, most_samples
        self._drawn: dict[tuple[MicroBatchLimits, int, int], Drawn] = {}
        self._remembered: dict[Hashable, Any] = {}

    def remember(self, key: Hashable, build: Callable[[], T]) -> T:
        """What was built for this key from the drawn micro-batches, built now if it was not."""
        if key not in self._remembered:
            self._remembered[key] = build()
        return self._remembered[key]

    def mean_step(self, dp_size: int) -> MicroBatches:
        """What a rank has in the average step, as if it were one micro-batch; arrays of one entry."""
        share = self.histogram.counts / self.histogram.counts.sum() * self.global_batch_size / dp_size
        columns = sample_columns(self.histogram, self.merge_unit, np.arange(len(share)))
        return MicroBatches(*((columns * share).sum(axis=1, keepdims=True)))

    def draw(self, budget: MicroBatchLimits, dp_size: int, multiple: int) -> Drawn:
        """The micro-batches of some ranks in some steps; of a very long step a part."""
        key = (budget, dp_size, multiple)
        if key not in self._drawn:
            of_rank = self.global_batch_size / dp_size
            step = self.mean_step(dp_size)
            expected = float(max(step.tokens[0] / budget.tokens, step.patches[0] / budget.patches))
            part = min(1.0, MOST_MICRO_BATCHES / max(expected, 1.0))
            ranks = min(dp_size, self._most_ranks, max(1, int(self._most_samples / (of_rank * part))))
            samples = max(1, round(of_rank * part * ranks))
            batches = draw_micro_batches(
                self.histogram, self.merge_unit, budget, samples, ranks, multiple, self._steps, self._pack, self._seed
            )
            self._drawn[key] = Drawn(
                batches, max(batches.tokens.shape[1], round(batches.tokens.shape[1] / part)), ranks
            )
        return self._drawn[key]
