"""The gap between two loss curves, and how much of it may be noise of these very curves.

Definition: over the same steps of both runs, gap = 100 % x (mean loss of B - mean loss of A) / mean loss of A.
Positive = B is worse.

The noise comes from the paired differences e_t = B_t - A_t - gap x A_t, so what both runs see in a step (the same
batch, the same decay) cancels. Neighbouring differences are not independent, and their long-run variance is estimated
from their lowest cosine frequencies, with quantiles of Student's t (Lazarus, Lewis, Stock and Watson, "HAR inference:
recommendations for practice", 2018). The margin is the largest of three such estimates with fewer and fewer
frequencies: differences that wander slowly show in the lowest ones only. What no pair of curves can tell is how far two
runs of one recipe on one machine would part by chance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from functools import cache

import numpy as np

CONFIDENCE = 0.95
LEAST_STEPS = 16
"""A window with fewer steps says nothing about noise."""
DEFAULT_THRESHOLD = 0.62
"""Percent: the final gap that the RoboBrain 2.5 paper (arXiv 2601.14352, section 5.3) reports between Moore Threads and
NVIDIA, without saying how it is defined."""


class Verdict(str, Enum):
    AGREE = "agree"
    DIFFER = "differ"
    TOO_NOISY = "too noisy to tell"

    __str__ = str.__str__


@dataclass(frozen=True)
class Gap:
    """A gap in percent with the half width of its 95 % interval."""

    percent: float
    margin: float
    steps: int

    @property
    def interval(self) -> tuple[float, float]:
        return self.percent - self.margin, self.percent + self.margin

    def verdict(self, threshold: float) -> Verdict:
        """Agree: the whole interval lies within +-threshold. Differ: the whole interval lies outside."""
        low, high = self.interval
        if -threshold <= low and high <= threshold:
            return Verdict.AGREE
        return Verdict.DIFFER if low > threshold or high < -threshold else Verdict.TOO_NOISY


def relative_gap(a: np.ndarray, b: np.ndarray) -> Gap:
    """The gap of B against A over a window; fewer than `LEAST_STEPS` steps have an infinite margin.

    Args:
        a, b: losses of the same steps, all finite, the mean of a above 0.
    """
    level = float(a.mean())
    ratio = float(b.mean()) / level - 1
    if len(a) < LEAST_STEPS:
        return Gap(100 * ratio, math.inf, len(a))
    residual = b - a - ratio * a
    return Gap(100 * ratio, 100 * _margin_of_mean(residual) / level, len(a))


def _margin_of_mean(values: np.ndarray) -> float:
    """Half width of the interval of the mean of a series whose neighbours may be alike."""
    steps = len(values)
    most = max(4, round(0.4 * steps ** (2 / 3)))
    frequencies = np.arange(1, most + 1)[:, None]
    waves = np.cos(np.pi * frequencies * (np.arange(steps) + 0.5) / steps)
    powers = 2 / steps * (waves @ (values - values.mean())) ** 2
    counts = sorted({most, most // 2, max(2, most // 4)})
    return max(student_quantile(n) * math.sqrt(powers[:n].mean() / steps) for n in counts)


@cache
def student_quantile(degrees: int) -> float:
    """Two-sided quantile of Student's t at `CONFIDENCE`, by integrating its density."""
    x = np.linspace(0.0, 60.0, 120_001)
    density = (1 + x * x / degrees) ** (-(degrees + 1) / 2)
    area = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2) * (x[1] - x[0])])
    half = math.sqrt(degrees * math.pi) / 2 * math.exp(math.lgamma(degrees / 2) - math.lgamma((degrees + 1) / 2))
    return float(np.interp(CONFIDENCE, area / half, x))


def default_window(steps: int) -> int:
    """Steps that count as the end of a run: its last tenth, but at least 50, and at most half of it."""
    return max(1, min(max(steps // 10, 50), steps // 2))


def gap_over_time(a: np.ndarray, b: np.ndarray, window: int, points: int = 60) -> list[tuple[int, Gap]]:
    """Gaps of windows of equal length as (index of the last step of the window, gap), the last one at the end."""
    ends = np.unique(np.linspace(window, len(a), points).round().astype(int)) if len(a) > window else [len(a)]
    return [(int(end) - 1, relative_gap(a[end - window : end], b[end - window : end])) for end in ends if end > 0]
