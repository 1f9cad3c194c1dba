"""What a model wrote, read back: points, points with depth, boxes; a failure says why.

Models wrap their answers in many ways: tuples, lists, JSON with `point_2d` or `bbox_2d`, `<point x= y=>` tags, code
fences, `<answer>` tags, words before and after, full-width punctuation. All of these are read. What is not one clear
answer in the unit that was asked for is a failure with its kind and one sentence, never a guess.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Generic, TypeVar

import numpy as np

from megatron_rb.spatial.points import GRID, ImageSize

LONGEST_ANSWER = 100_000
"""Characters; a longer answer is not searched."""
MOST_POINTS = 1000
DEEPEST = 1000.0
"""Metres; more is no place that a camera saw, but millimetres or nonsense."""
FRACTIONS = ImageSize(1, 1)
"""As the size of an image: coordinates are fractions of it."""

_NUMBER = r"[-+\d.eE]+"
_VALUE = rf"{_NUMBER}(?:\s*m(?:eters?|etres?)?\b)?"
_GROUP = re.compile(rf"[(\[]\s*({_VALUE}(?:\s*[,;]\s*{_VALUE})+)\s*,?\s*[)\]]")
_OPEN_TAIL = re.compile(r"[(\[][-+\d.eE,\s]*$")
_POINT_TAG = re.compile(r"""<points?\b[^<>]*>""")
_ATTRIBUTE = re.compile(r"""\b([xyd])\d*\s*=\s*["']?\s*([-+\d.eE]+)""")
_NAMED = re.compile(
    rf"""["']?\bx["']?\s*[:=]\s*({_NUMBER})\s*[,;]\s*["']?y["']?\s*[:=]\s*({_NUMBER})"""
    rf"""(?:\s*[,;]\s*["']?(?:d|z|depth)["']?\s*[:=]\s*({_NUMBER}))?"""
)
_BARE = re.compile(rf"\s*({_NUMBER}(?:\s*,\s*{_NUMBER})+)\s*\.?\s*")
_CODE = re.compile(r"^\s*(?:def |import |from \w+ import |print\(|for \w+ in |class )", re.MULTILINE)
_NO_NUMBER = re.compile(r"[(\[][-+\d.,\s]{0,100}\b(?:nan|inf(?:inity)?|null|none)\b", re.IGNORECASE)
_WIDE = str.maketrans("（），［］；：−–", "(),[];:--")
_ANSWER_TAG = re.compile(r"<answer>(.*?)(?:</answer>|$)", re.DOTALL)


class AnswerProblem(str, Enum):
    """Why an answer could not be read."""

    EMPTY = "empty"
    NOT_FOUND = "nothing of the form that was asked for"
    INCOMPLETE = "ends inside a tuple"
    CODE = "program code"
    TOO_LONG = "too long"
    NOT_A_NUMBER = "not a number"
    WRONG_LENGTH = "wrong number of values"
    OUT_OF_RANGE = "outside the image"
    BAD_DEPTH = "unusable depth"
    AMBIGUOUS = "several answers"
    UNKNOWN_UNIT = "unknown unit"
    OTHER_UNIT = "coordinates of another unit"

    __str__ = str.__str__


T = TypeVar("T")


@dataclass(frozen=True)
class Answer(Generic[T]):
    """A value that was read, or why there is none; each kind says what its value is, and what stands for none."""

    value: T
    reason: str = ""
    """Why nothing could be read; empty on success."""
    problem: AnswerProblem | None = None
    """The kind of failure, for counting."""

    @property
    def ok(self) -> bool:
        return not self.reason


class PointsAnswer(Answer[np.ndarray]):
    @property
    def points(self) -> np.ndarray:
        """[n, 2] in the unit that was asked for, or [n, 3] with metres; [0, ...] on failure."""
        return self.value


class BoxAnswer(Answer[np.ndarray]):
    @property
    def box(self) -> np.ndarray:
        """[4]: x1, y1, x2, y2 with x1 <= x2 and y1 <= y2; zeros on failure."""
        return self.value


@dataclass(frozen=True)
class _Failure:
    problem: AnswerProblem
    reason: str


def final_answer(text: str) -> str:
    """What follows the reasoning: the part after the last `</think>`, inside the last `<answer>` if there is one."""
    tail = text.rpartition("</think>")[2]
    if "<answer>" in tail:
        return _ANSWER_TAG.findall(tail)[-1].strip()
    return tail


def parse_points(text: str, size: ImageSize | None = None, *, anywhere: bool = False) -> PointsAnswer:
    """`[(x, y), ...]`.

    Args:
        size: coordinates are pixels of an image of this size; None = they are 0-1000; `FRACTIONS` = they are 0-1.
        anywhere: points outside the image are given back too, for metrics that count each of them as a miss.
    """
    return _parse_tuples(text, 2, size, anywhere)


def parse_points_with_depth(text: str, size: ImageSize | None = None) -> PointsAnswer:
    """`[(x, y, d), ...]` with positive metres; `size` as for `parse_points`."""
    return _parse_tuples(text, 3, size, anywhere=False)


def parse_box(text: str, size: ImageSize | None = None) -> BoxAnswer:
    """`[x1, y1, x2, y2]`, or two corners `[(x1, y1), (x2, y2)]`; corners may come in any order."""
    rows = _find_rows(text)
    nothing = np.zeros(4)
    if isinstance(rows, _Failure):
        return BoxAnswer(nothing, rows.reason, rows.problem)
    if [len(row) for row in rows] == [2, 2]:
        rows = [[*rows[0], *rows[1]]]
    if len(rows) != 1:
        return BoxAnswer(nothing, f"found {len(rows)} groups of numbers, expected one box", AnswerProblem.AMBIGUOUS)
    wrong = _check(rows, 4, size)
    if wrong is not None:
        return BoxAnswer(nothing, wrong.reason, wrong.problem)
    x1, y1, x2, y2 = rows[0]
    return BoxAnswer(np.array([min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)], dtype=np.float64))


def _parse_tuples(text: str, length: int, size: ImageSize | None, anywhere: bool) -> PointsAnswer:
    rows = _find_rows(text)
    if not isinstance(rows, _Failure):
        rows = _regroup(rows, length)
        wrong = _check(rows, length, size, anywhere)
        if wrong is None:
            return PointsAnswer(np.array(rows, dtype=np.float64))
        rows = wrong
    return PointsAnswer(np.zeros((0, length)), rows.reason, rows.problem)


def _find_rows(text: str) -> list[list[float]] | _Failure:
    """The groups of numbers of an answer."""
    if len(text) > LONGEST_ANSWER:
        return _Failure(
            AnswerProblem.TOO_LONG, f"the answer has {len(text)} characters, at most {LONGEST_ANSWER} are read"
        )
    if "<" in text:
        text = final_answer(text)
    if len(text) > 500:
        text = " ".join(text.split())  # patterns take quadratic time on long runs of blanks
    if not text.isascii():
        text = text.translate(_WIDE)
    groups = _GROUP.findall(text)
    rest = text[text.rfind(groups[-1]) + len(groups[-1]) :] if groups else text
    if _OPEN_TAIL.search(rest):
        return _Failure(AnswerProblem.INCOMPLETE, f"the answer ends inside a tuple: ...{text[-30:]!r}")
    if not groups:
        groups = _other_spellings(text)
    if not groups:
        return _nothing_found(text)
    if len(groups) > MOST_POINTS:
        return _Failure(AnswerProblem.TOO_LONG, f"the answer holds {len(groups)} points, at most {MOST_POINTS} count")
    try:
        return [[float(number.partition("m")[0]) for number in _split(group)] for group in groups]
    except ValueError as error:
        return _Failure(AnswerProblem.NOT_A_NUMBER, f"a tuple holds something that is not a number: {error}")


def _split(group: str) -> list[str]:
    return group.replace(";", ",").split(",")


def _other_spellings(text: str) -> list[str]:
    """Tags, named coordinates and bare numbers, as comma-separated groups."""
    groups = []
    for tag in _POINT_TAG.findall(text):
        numbers: dict[str, list[str]] = {}
        for name, number in _ATTRIBUTE.findall(tag):
            numbers.setdefault(name, []).append(number)
        groups += [
            ",".join(point) for point in zip(*(numbers[name] for name in "xyd" if name in numbers), strict=False)
        ]
    if groups:
        return groups
    named = [",".join(filter(None, match)) for match in _NAMED.findall(text)]
    if named:
        return named
    bare = _BARE.fullmatch(text)
    return [bare[1]] if bare else []


def _nothing_found(text: str) -> _Failure:
    if not text.strip():
        return _Failure(AnswerProblem.EMPTY, "the answer is empty")
    if _NO_NUMBER.search(text):
        return _Failure(AnswerProblem.NOT_A_NUMBER, "a tuple holds nan, inf, null or none in place of a number")
    if _CODE.search(text):
        return _Failure(AnswerProblem.CODE, "found no tuple of numbers; the answer is program code")
    return _Failure(AnswerProblem.NOT_FOUND, "found no tuple of numbers")


def _regroup(rows: list[list[float]], length: int) -> list[list[float]]:
    """One flat list of several points `[x1, y1, x2, y2, x3, y3]` as points. Four numbers are a box and stay as they
    are, as does a list of another length, for the error."""
    if len(rows) == 1 and len(rows[0]) > 4 and len(rows[0]) % length == 0:
        flat = rows[0]
        return [flat[start : start + length] for start in range(0, len(flat), length)]
    return rows


def _check(
    rows: Sequence[Sequence[float]], length: int, size: ImageSize | None, anywhere: bool = False
) -> _Failure | None:
    width, height, unit = (GRID, GRID, f"0-{GRID}") if size is None else (size.width, size.height, f"{size}")
    if rows[0][0] <= 1 and size != FRACTIONS and _are_fractions(rows, length):
        reason = f"{tuple(rows[0])} are fractions of the image; {'0-1000' if size is None else 'pixels'} was asked for"
        return _Failure(AnswerProblem.OTHER_UNIT, reason)
    for row in rows:
        if len(row) != length:
            reason = f"tuple {tuple(row)} has {len(row)} numbers, expected {length}"
            return _Failure(AnswerProblem.WRONG_LENGTH, reason)
        for x, y in (row[:2], row[2:]) if length == 4 else (row[:2],):
            if not anywhere and not (0 <= x <= width and 0 <= y <= height):
                return _Failure(AnswerProblem.OUT_OF_RANGE, f"point {(x, y)} lies outside {unit}")
        if length == 3 and not 0 < row[2] < DEEPEST:
            reason = f"depth {row[2]:g} is not a positive number of metres below {DEEPEST:g}"
            return _Failure(AnswerProblem.BAD_DEPTH, reason)
    return None


def _are_fractions(rows: Sequence[Sequence[float]], length: int) -> bool:
    """Whether all coordinates lie in [0, 1] and not all are 0 or 1."""
    places = [value for row in rows for value in row[: 2 if length == 3 else length]]
    return all(0 <= value <= 1 for value in places) and any(value not in (0, 1) for value in places)
