"""Scores of single answers: boxes, lengths, numbers, plans, choices."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

IOU_THRESHOLDS = (0.5, 0.75, 0.9)
MRA_THRESHOLDS = np.arange(0.5, 0.951, 0.05)


def box_iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two boxes [4] (x1, y1, x2, y2) in one unit; 0 where both are empty."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    common = float(np.prod(np.maximum(sides, 0.0)))
    union = float(np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2])) - common
    return common / union if union > 0 else 0.0


def iou_at(ious: Sequence[float], threshold: float) -> float:
    """Share of boxes with an IoU of at least the threshold; a failed answer counts as 0."""
    return float((np.asarray(ious, dtype=np.float64) >= threshold).mean())


def ratio_success(predicted: float, truth: float, factor: float = 2.0) -> bool:
    """MSMU and Q-Spatial: right when 1 / factor <= predicted / truth <= factor; both in one unit, truth positive."""
    if not truth > 0:
        raise ValueError(f"the true length {truth} must be positive")
    return 1.0 / factor <= predicted / truth <= factor


def mean_relative_accuracy(predicted: float, truth: float) -> float:
    """VSI-Bench: share of thresholds t in .50, .55, ..., .95 with |predicted - truth| / |truth| < 1 - t."""
    if truth == 0 or not np.isfinite(truth):
        raise ValueError(f"the true number {truth} must be finite and not 0")
    error = abs(predicted - truth) / abs(truth)
    # thresholds in steps of .05 are not exact in binary: a hair's breadth is given so that the border stays outside
    return float((error < 1.0 - MRA_THRESHOLDS - 1e-9).mean())


def plan_match(predicted: str, truth: Any) -> bool:
    """Multi-robot planning: the answer is JSON and equal to the truth; order of keys and blanks do not matter.

    A Markdown fence around the JSON is taken off. Text that is no JSON is wrong.
    """
    text = predicted.strip()
    if text.startswith("```"):
        text = text.partition("\n")[2].rpartition("```")[0]
    try:
        return bool(json.loads(text) == (json.loads(truth) if isinstance(truth, str) else truth))
    except ValueError:
        return False
