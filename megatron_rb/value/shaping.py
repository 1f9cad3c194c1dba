"""Progress as a reward that leaves the optimal policy alone.

Source: Robo-Dopamine (arXiv 2512.23703), policy-invariant reward shaping, after Ng, Harada and Russell (1999). The
plain difference of progress as a reward makes it pay to linger in states of high progress; the discounted difference
does not.
"""

from __future__ import annotations

import numpy as np

GAMMA, DELTA = 0.99, 0.05


def gold_reward(progress: np.ndarray, delta: float = DELTA) -> np.ndarray:
    """1 where progress has reached 1 - delta, else 0; any shape."""
    return (np.asarray(progress, dtype=np.float64) >= 1.0 - delta).astype(np.float64)


def shaped_reward(
    progress: np.ndarray, next_progress: np.ndarray, gamma: float = GAMMA, delta: float = DELTA
) -> np.ndarray:
    """r = gold(Phi(s')) + gamma * Phi(s') - Phi(s) of transitions s -> s'.

    `gamma` must be the discount of the learner: its discounted sum of the last two terms is then -Phi(s_0) whatever the
    policy does (plus gamma^T Phi(s_T) where an episode is cut after T steps).

    Args:
        progress, next_progress: Phi in [0, 1], one shape.
    """
    if not 0 < gamma <= 1:
        raise ValueError(f"discount {gamma:g} must be above 0 and at most 1")
    after = np.asarray(next_progress, dtype=np.float64)
    return gold_reward(after, delta) + gamma * after - np.asarray(progress, dtype=np.float64)


def naive_reward(progress: np.ndarray, next_progress: np.ndarray, delta: float = DELTA) -> np.ndarray:
    """gold(Phi(s')) + Phi(s') - Phi(s), for comparison: it changes what is optimal wherever gamma < 1."""
    after = np.asarray(next_progress, dtype=np.float64)
    return gold_reward(after, delta) + after - np.asarray(progress, dtype=np.float64)
