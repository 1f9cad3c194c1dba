"""Pointing: share of answers that land on the object, and what answering without looking at the picture would reach."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_rb.spatial.answers import parse_points
from megatron_rb.spatial.points import ImageSize, grid_to_pixels, pixel_index


@dataclass(frozen=True)
class HitRate:
    rate: float
    """Mean over answers of the share of their points inside the mask; an answer that cannot be read counts 0."""
    unreadable: int
    """Answers without a point."""
    count: int


def point_in_mask(points: np.ndarray, mask: np.ndarray) -> float:
    """Share of the points [n, 2] (0-1000) inside a bool mask [height, width]; no point = 0."""
    if len(points) == 0:
        return 0.0
    size = ImageSize(mask.shape[1], mask.shape[0])
    return float(mask[pixel_index(grid_to_pixels(points, size), size)].mean())


def hit_rate(answers: Sequence[str], masks: Sequence[np.ndarray]) -> HitRate:
    """Score texts like `[(x, y)]` against one mask each."""
    if not answers or len(answers) != len(masks):
        raise ValueError(f"{len(answers)} answers and {len(masks)} masks; give as many masks as answers")
    read = [parse_points(answer) for answer in answers]
    scores = [point_in_mask(answer.points, mask) for answer, mask in zip(read, masks, strict=True)]
    return HitRate(float(np.mean(scores)), sum(not answer.ok for answer in read), len(scores))


def constant_point(points: np.ndarray) -> np.ndarray:
    """The mean training answer [2] (0-1000, whole numbers): the best single point to say without looking."""
    points = np.asarray(points, dtype=np.float64)
    if points.ndim != 2 or len(points) == 0:
        raise ValueError(f"training points have shape {points.shape}; give [n, 2] with n of at least 1")
    return np.rint(points.mean(axis=0))


def constant_token_loss(
    train_answers: Sequence[Sequence[int]], heldout_answers: Sequence[Sequence[int]], vocab_size: int
) -> float:
    """Mean loss (nats per token) of held-out answers under the token frequencies of the training answers.

    One distribution per position in the answer, counts plus one; a position no training answer reaches is uniform.
    """
    tokens = sum(len(answer) for answer in heldout_answers)
    if tokens == 0:
        raise ValueError("the held-out answers hold no token; give at least one")
    counts = np.ones((max(map(len, [*train_answers, *heldout_answers])), vocab_size))
    for answer in train_answers:
        np.add.at(counts, (np.arange(len(answer)), np.asarray(answer, dtype=np.int64)), 1.0)
    log_shares = np.log(counts) - np.log(counts.sum(axis=1, keepdims=True))
    return -float(sum(log_shares[np.arange(len(answer)), answer].sum() for answer in heldout_answers)) / tokens
