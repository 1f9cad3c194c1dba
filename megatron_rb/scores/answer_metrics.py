"""Scores of single answers: boxes, lengths, numbers, plans, choices."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_rb.spatial.answers import final_answer

IOU_THRESHOLDS = (0.5, 0.75, 0.9)
MRA_THRESHOLDS = np.arange(0.5, 0.951, 0.05)


def box_iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two boxes `[4]` (x1, y1, x2, y2) in one unit; 0 where both are empty.

    Protocol (affordance, ShareRobot): one box per answer. The mean over all questions, which FlagEvalMM calls average
    precision, is the score of the kind; an answer without a box is 0, where that tool leaves it out.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    common = float(np.prod(np.maximum(sides, 0.0)))
    union = float(np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2])) - common
    return common / union if union > 0 else 0.0


def iou_at(ious: Sequence[float], threshold: float) -> float:
    """Share of all questions with an IoU of at least the threshold (.5, .75, .9); a failed answer counts as 0."""
    return float((np.asarray(ious, dtype=np.float64) >= threshold).mean())


def ratio_success(predicted: float, truth: float, factor: float = 2.0) -> bool:
    """MSMU and Q-Spatial: right when 1 / factor <= predicted / truth <= factor; both in one unit, truth positive.

    Protocol: the share of right answers over all questions; one without a length, or with several that contradict each
    other, is wrong.
    """
    if not truth > 0:
        raise ValueError(f"the true length {truth} must be positive")
    return 1.0 / factor <= predicted / truth <= factor


def mean_relative_accuracy(predicted: float, truth: float, border_met: bool = False) -> float:
    """VSI-Bench: share of thresholds t in .50, .55, ..., .95 with |predicted - truth| / |truth| < 1 - t.

    Protocol as in the paper. The mean over all questions is the score; an answer without one clear number is 0, where
    the released code takes the first number it finds.

    Args:
        border_met: count the border itself as met (<=), as the released code and FlagEvalMM do.
    """
    if truth == 0 or not np.isfinite(truth):
        raise ValueError(f"the true number {truth} must be finite and not 0")
    error = abs(predicted - truth) / abs(truth)
    # thresholds in steps of .05 are not exact in binary: a hair's breadth says on which side the border is
    return float((error < 1.0 - MRA_THRESHOLDS + (1e-9 if border_met else -1e-9)).mean())


def plan_match(predicted: str, truth: Any) -> bool:
    """Multi-robot planning (RoboBrain 2.0): the answer is JSON and equal to the truth, 0 or 1 per question.

    Order of keys and blanks do not matter; nothing is scored in part. A Markdown fence around the JSON, thoughts before
    it and `<answer>` tags are taken off. Text that is no JSON is wrong.
    """
    value, wrong = read_plan(predicted)
    if wrong:
        return False
    return bool(value == (read_plan(truth)[0] if isinstance(truth, str) else truth))


def read_plan(text: str) -> tuple[Any, str]:
    """The JSON of an answer, and why there is none."""
    text = final_answer(text).strip()
    if text.startswith("```"):
        text = text.partition("\n")[2].rpartition("```")[0]
    try:
        return json.loads(text), ""
    except (ValueError, RecursionError) as error:
        return None, f"the answer is no JSON: {error}"
