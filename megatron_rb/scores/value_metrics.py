"""Value order correlation: does the predicted progress rise as time does?

Source: GVL's VOC; VOC+ and VOC- as Robo-Dopamine (arXiv 2512.23703) evaluates them: neighbouring pairs of evenly spaced
frames forwards from 0, and the same pairs swapped and walked backwards from 1; rebuilt by the incremental rule.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_rb.value.reconstruct import incremental

INTERVAL = 30
"""Frames between two compared frames."""


def evaluation_frames(num_frames: int, interval: int = INTERVAL) -> list[int]:
    """num_frames // interval evenly spaced frame numbers, first and last included; at least two."""
    if num_frames < 2 or interval < 1:
        raise ValueError(f"{num_frames} frames at an interval of {interval}; an episode needs at least 2 frames")
    count = min(max(2, num_frames // interval), num_frames)
    return np.linspace(0, num_frames - 1, count).round().astype(int).tolist()


def spearman(values: Sequence[float] | np.ndarray) -> float:
    """Rank correlation of values [T] with their order in time; ties share their mean rank.

    0 where it is not defined (all values equal, fewer than two), as the released evaluation counts it.
    """
    values = np.asarray(values, dtype=np.float64)
    if len(values) < 2 or not np.isfinite(values).all() or (values == values[0]).all():
        return 0.0
    return float(np.corrcoef(_ranks(values), np.arange(len(values)))[0, 1])


def voc_plus(hops: Sequence[float]) -> float:
    """VOC+ of one episode.

    Protocol: frames as `evaluation_frames` picks them, the model asked about each neighbouring pair in the order of
    time, progress rebuilt from 0 by the incremental rule; its rank correlation with time. A benchmark's figure is the
    mean over its episodes, in which one that is not defined counts as 0.

    Args:
        hops: H(frame t, frame t + 1) in the order of time; NaN = an answer that could not be read, which moves nothing.
    """
    return spearman(incremental(hops, start=0.0))


def voc_minus(hops: Sequence[float]) -> float:
    """VOC- of one episode.

    Protocol: the pairs of VOC+ with BEFORE and AFTER swapped, so that a true answer is a loss: it tells models that see
    progress in everything from those that look. Correlation and mean as for VOC+.

    Args:
        hops: H(frame t + 1, frame t): BEFORE and AFTER swapped, in the order of time of t. They are walked from the
            last pair to the first, starting at progress 1; the values are compared in the original order of time.
    """
    return spearman(incremental(list(hops)[::-1], start=1.0)[::-1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2.0)[place]
