"""Pointing: share of answers that land on the object, and what answering without looking at the picture would reach."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from megatron_rb.spatial.answers import MOST_POINTS
from megatron_rb.spatial.points import GRID, ImageSize, pixel_index

LONGEST_LINE = 100_000
_TUPLE = re.compile(r"\(([-+]?\d+(?:\.\d*)?(?:,\s*[-+]?\d+(?:\.\d*)?)*?)\)")
"""What FlagEvalMM's own pattern takes (`point_utils.text2pts`), in a form that needs no second look at a digit."""


def point_in_mask(points: np.ndarray, mask: np.ndarray) -> float:
    """Share of predicted points on the mask; no point = 0.

    Protocol (Where2Place, RefSpatial, RoboSpatial pointing): the mean over all predicted points of the mask's value
    under them; a point outside the image is a miss. FlagEvalMM's norm1k variant moves such points to the edge instead.

    Args:
        points: `[n, 2]` in 0-1000; 1000 itself belongs to the last pixel.
        mask: `[height, width]` in [0, 1], or bool.
    """
    if len(points) == 0:
        return 0.0
    size = ImageSize(mask.shape[1], mask.shape[0])
    points = np.asarray(points, dtype=np.float64)
    within = np.asarray(((points >= 0) & (points <= GRID)).all(axis=-1))
    hits = mask[pixel_index(np.where(within[:, None], points, 0.0) / GRID * size.extent, size)]
    return float(np.where(within, hits, 0.0).mean())


def box_in_mask(box: np.ndarray, mask: np.ndarray) -> float:
    """The same for a box `[4]` (0-1000) given in place of points: the mean of the mask over all pixels in it.

    Pixels as FlagEvalMM counts them: corners cut to whole pixels, the far row and column left out; none = 0.
    """
    size = ImageSize(mask.shape[1], mask.shape[0])
    (left, top), (right, bottom) = (np.asarray(box).reshape(2, 2) / GRID * size.extent).astype(np.int64)
    inside = mask[top:bottom, left:right]
    return float(inside.mean()) if inside.size else 0.0


def flagevalmm_in_mask(text: str, mask: np.ndarray) -> tuple[float, int]:
    """Share of an answer's pixels on the mask, and how many it names, as FlagEvalMM's Where2Place and RoboSpatial tasks
    read it.

    Only the last line counts. A tuple with a decimal point holds fractions of the picture, one without it pixels; a
    pixel outside is a miss; four numbers are a box and stand for all its pixels within the picture.
    """
    height, width = mask.shape
    hits, named = 0.0, 0
    for match in _TUPLE.findall(text[-LONGEST_LINE:].strip().split("\n")[-1])[:MOST_POINTS]:
        words = match.split(",")
        fractions = any("." in word for word in (words[:1] if len(words) == 4 else words))
        extent = (width, height, width, height) if fractions else (1, 1, 1, 1)
        numbers = [int(max(min(float(word) * side, 1e9), -1e9)) for word, side in zip(words, extent, strict=False)]
        if len(words) == 2:
            column, row = numbers
            named += 1
            hits += float(mask[row, column]) if 0 <= row < height and 0 <= column < width else 0.0
        elif len(words) == 4:
            left, top, right, bottom = numbers
            inside = mask[max(0, top) : max(0, bottom), max(0, left) : max(0, right)]
            named += inside.size
            hits += float(inside.sum())
    return (hits / named if named else 0.0), named


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
