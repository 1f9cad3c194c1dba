"""What a model wrote, read back: points, points with depth, scores; a failure says why."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_rb.spatial.points import GRID

_TUPLE = re.compile(r"[(\[]\s*([-+\d.eE]+(?:\s*,\s*[-+\d.eE]+)+)\s*[)\]]")
_SCORE = re.compile(r"<score>\s*([-+]?\d+(?:\.\d+)?)\s*%\s*</score>")


@dataclass(frozen=True)
class PointsAnswer:
    points: np.ndarray
    """[n, 2] of 0-1000, or [n, 3] with metres; [0, ...] on failure."""
    reason: str = ""
    """Why nothing could be read; empty on success."""

    @property
    def ok(self) -> bool:
        return not self.reason


@dataclass(frozen=True)
class ScoreAnswer:
    hop: float
    """In [-1, 1]; 0 on failure, the value that moves no progress."""
    reason: str = ""
    """Why nothing could be read; empty on success."""

    @property
    def ok(self) -> bool:
        return not self.reason


def parse_points(text: str) -> PointsAnswer:
    """`[(x, y), ...]` with 0-1000 coordinates."""
    return _parse_tuples(text, 2)


def parse_points_with_depth(text: str) -> PointsAnswer:
    """`[(x, y, d), ...]` with 0-1000 coordinates and positive metres."""
    return _parse_tuples(text, 3)


def parse_score(text: str) -> ScoreAnswer:
    """The one `<score>+NN%</score>` of a text; magnitudes above 100 % count as 100 %."""
    scores = _SCORE.findall(text)
    if len(scores) != 1:
        return ScoreAnswer(0.0, f"found {len(scores)} scores of the form <score>+NN%</score>, expected one")
    return ScoreAnswer(float(np.clip(float(scores[0]) / 100.0, -1.0, 1.0)))


def _parse_tuples(text: str, length: int) -> PointsAnswer:
    nothing = np.zeros((0, length))
    groups = _TUPLE.findall(text)
    if not groups:
        return PointsAnswer(nothing, f"found no tuple of {length} numbers")
    try:
        rows = [[float(number) for number in group.split(",")] for group in groups]
    except ValueError as error:
        return PointsAnswer(nothing, f"a tuple holds something that is not a number: {error}")
    return _checked(rows, length, nothing)


def _checked(rows: Sequence[Sequence[float]], length: int, nothing: np.ndarray) -> PointsAnswer:
    for row in rows:
        if len(row) != length:
            return PointsAnswer(nothing, f"tuple {tuple(row)} has {len(row)} numbers, expected {length}")
        if not all(0 <= value <= GRID for value in row[:2]):
            return PointsAnswer(nothing, f"point {tuple(row[:2])} lies outside 0-{GRID}")
        if length == 3 and not 0 < row[2] < float("inf"):
            return PointsAnswer(nothing, f"depth {row[2]} is not a positive number of metres")
    return PointsAnswer(np.array(rows, dtype=np.float64))
