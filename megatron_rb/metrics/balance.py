"""How full micro-batches are, and how evenly tokens and patches lie on them and on the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Balance:
    """One step or several; the ratios of several steps are means, `worst_*` the largest of them."""

    fill: float
    """Tokens of the micro-batches over their token budget, 0..1."""
    micro_batch_tokens: float
    """Largest over mean, over all micro-batches of a step."""
    micro_batch_patches: float
    """The same for patches; 1 for steps without patches."""
    rank_tokens: float
    """Largest over mean, over the sums of the data-parallel ranks."""
    rank_patches: float
    worst_micro_batch_patches: float
    least_fill: float


def balance_of(steps: Sequence[np.ndarray], seq_length: int) -> Balance:
    """
    Args:
        steps: for each step int `[ranks, micro-batches, 2]`, tokens and patches; what is empty counts as 0.
        seq_length: token budget of a micro-batch.

    Raises:
        ValueError: there is no step.
    """
    if not len(steps):
        raise ValueError("there is no step to measure the balance of")
    fills = [float(step[..., 0].mean() / seq_length) for step in steps]
    batches = np.array([_max_over_mean(step.reshape(-1, 2)) for step in steps])
    ranks = np.array([_max_over_mean(step.sum(axis=1)) for step in steps])
    return Balance(
        fill=float(np.mean(fills)),
        micro_batch_tokens=float(batches[:, 0].mean()),
        micro_batch_patches=float(batches[:, 1].mean()),
        rank_tokens=float(ranks[:, 0].mean()),
        rank_patches=float(ranks[:, 1].mean()),
        worst_micro_batch_patches=float(batches[:, 1].max()),
        least_fill=min(fills),
    )


def _max_over_mean(loads: np.ndarray) -> np.ndarray:
    mean = loads.mean(axis=0)
    return np.divide(loads.max(axis=0), mean, out=np.ones(2), where=mean > 0)
