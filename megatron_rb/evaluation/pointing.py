"""Pointing: share of answers that land on the object, and what answering without looking at the picture would reach."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_rb.spatial.points import ImageSize, grid_to_pixels, pixel_index


def point_in_mask(points: np.ndarray, mask: np.ndarray) -> float:
    """Share of the points [n, 2] (0-1000) inside a bool mask [height, width]; no point = 0."""
    if len(points) == 0:
        return 0.0
    size = ImageSize(mask.shape[1], mask.shape[0])
    return float(mask[pixel_index(grid_to_pixels(points, size), size)].mean())


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
