"""What a model wrote, read back: points, points with depth, boxes, lengths, choices; a failure says why.

Models wrap their answers in many ways: tuples, lists, JSON with `point_2d` or `bbox_2d`, `<point x= y=>` tags, code
fences, `<answer>` tags, words before and after, full-width punctuation. All of these are read. What is not one clear
answer in the unit that was asked for is a failure with its kind and one sentence, never a guess.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from megatron_rb.spatial.points import GRID, ImageSize

LONGEST_ANSWER = 100_000
"""Characters; a longer answer is not searched."""
MOST_POINTS = 1000

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
_WIDE = str.maketrans("（），［］；：−–", "(),[];:--")
_ANSWER_TAG = re.compile(r"<answer>(.*?)(?:</answer>|$)", re.DOTALL)


class AnswerProblem(StrEnum):
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


@dataclass(frozen=True)
class PointsAnswer:
    points: np.ndarray
    """[n, 2] in the unit that was asked for, or [n, 3] with metres; [0, ...] on failure."""
    reason: str = ""
    """Why nothing could be read; empty on success."""
    problem: AnswerProblem | None = None
    """The kind of failure, for counting."""

    @property
    def ok(self) -> bool:
        return not self.reason


@dataclass(frozen=True)
class BoxAnswer:
    box: np.ndarray
    """[4]: x1, y1, x2, y2 with x1 <= x2 and y1 <= y2; zeros on failure."""
    reason: str = ""
    problem: AnswerProblem | None = None

    @property
    def ok(self) -> bool:
        return not self.reason


@dataclass(frozen=True)
class LengthAnswer:
    metres: float
    """NaN on failure."""
    reason: str = ""
    problem: AnswerProblem | None = None

    @property
    def ok(self) -> bool:
        return not self.reason


@dataclass(frozen=True)
class ChoiceAnswer:
    letter: str
    """A capital letter; empty on failure."""
    reason: str = ""
    problem: AnswerProblem | None = None

    @property
    def ok(self) -> bool:
        return not self.reason


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


def parse_points(text: str, size: ImageSize | None = None) -> PointsAnswer:
    """`[(x, y), ...]`.

    Args:
        size: coordinates are pixels of an image of this size; None = they are 0-1000.
    """
    return _parse_tuples(text, 2, size)


def parse_points_with_depth(text: str, size: ImageSize | None = None) -> PointsAnswer:
    """`[(x, y, d), ...]` with positive metres; `size` as for `parse_points`."""
    return _parse_tuples(text, 3, size)


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
    corners = np.array(rows[0], dtype=np.float64).reshape(2, 2)
    return BoxAnswer(np.concatenate([corners.min(axis=0), corners.max(axis=0)]))


_METRES = {
    "mm": 0.001, "millimeter": 0.001, "millimetre": 0.001, "cm": 0.01, "centimeter": 0.01, "centimetre": 0.01,
    "m": 1.0, "meter": 1.0, "metre": 1.0, "inch": 0.0254, "inches": 0.0254, "in": 0.0254, '"': 0.0254, "”": 0.0254,
    "foot": 0.3048, "feet": 0.3048, "ft": 0.3048, "'": 0.3048,
}  # fmt: skip
_LENGTH = re.compile(
    r"(?<![\w.])([-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*([A-Za-z]+|[\"”'])?"
)


def parse_length(text: str, default_unit: str = "") -> LengthAnswer:
    """The one length of an answer such as `0.104m`, `10.4 cm`, `about 4 inches`, in metres.

    Several lengths are read when they say the same (`10 cm, that is 0.1 m`, to 2 %); else the answer is a failure.

    Args:
        default_unit: unit of a number that stands alone; empty = a number without unit is a failure.
    """
    text = final_answer(text[: LONGEST_ANSWER + 1])
    if len(text) > LONGEST_ANSWER:
        return LengthAnswer(
            float("nan"), f"the answer has more than {LONGEST_ANSWER} characters", AnswerProblem.TOO_LONG
        )
    found = _LENGTH.findall(text)
    known = [(number, _METRES[name]) for number, unit in found if (name := _unit(unit)) in _METRES]
    if not known and default_unit and len(found) == 1:
        known = [(found[0][0], _METRES[default_unit])]
    if not known:
        kind = AnswerProblem.UNKNOWN_UNIT if found else AnswerProblem.NOT_FOUND
        return LengthAnswer(float("nan"), "found no number with a unit of length (m, cm, mm, inch, foot)", kind)
    values = [float(number.replace(",", "")) * factor for number, factor in known]
    if max(values) - min(values) > 0.02 * max(map(abs, values)):
        return LengthAnswer(float("nan"), f"found the lengths {values} m, expected one", AnswerProblem.AMBIGUOUS)
    if not 0 <= values[0] < float("inf"):
        return LengthAnswer(float("nan"), f"{values[0]} m is not a length", AnswerProblem.OUT_OF_RANGE)
    return LengthAnswer(values[0])


_ANY_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")


@dataclass(frozen=True)
class NumberAnswer:
    value: float
    """NaN on failure."""
    reason: str = ""
    problem: AnswerProblem | None = None

    @property
    def ok(self) -> bool:
        return not self.reason


def parse_number(text: str) -> NumberAnswer:
    """The one number of an answer; the same number said twice is read, two different ones are a failure."""
    if len(text) > LONGEST_ANSWER:
        return NumberAnswer(float("nan"), f"the answer has over {LONGEST_ANSWER} characters", AnswerProblem.TOO_LONG)
    found = {float(number.replace(",", "")) for number in _ANY_NUMBER.findall(final_answer(text))}
    if len(found) == 1:
        return NumberAnswer(found.pop())
    problem = AnswerProblem.AMBIGUOUS if found else AnswerProblem.NOT_FOUND
    return NumberAnswer(float("nan"), f"found {len(found)} different numbers, expected one", problem)


_CHOICE = re.compile(r"\(([A-Z])\)|\b([A-Z])(?=[).:]|\s*$)|(?:answer|option|choice)\s*(?:is|:)?\s*\(?([A-Z])\b")


def parse_choice(text: str, letters: str = "ABCD") -> ChoiceAnswer:
    """The letter of a multiple choice: `B`, `(B)`, `B. the cup`, `The answer is B`."""
    text = final_answer(text[:LONGEST_ANSWER]).strip()
    if not text:
        return ChoiceAnswer("", "the answer is empty", AnswerProblem.EMPTY)
    found = {letter for match in _CHOICE.findall(text) for letter in match if letter and letter in letters}
    if len(found) == 1:
        return ChoiceAnswer(found.pop())
    if len(found) > 1:
        return ChoiceAnswer("", f"found the choices {', '.join(sorted(found))}, expected one", AnswerProblem.AMBIGUOUS)
    return ChoiceAnswer("", f"found none of the choices {', '.join(letters)}", AnswerProblem.NOT_FOUND)


def _unit(word: str) -> str:
    lower = word.lower()
    return lower if lower in _METRES else lower.removesuffix("s")


def _parse_tuples(text: str, length: int, size: ImageSize | None) -> PointsAnswer:
    rows = _find_rows(text)
    if not isinstance(rows, _Failure):
        rows = _regroup(rows, length)
        wrong = _check(rows, length, size)
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


def _check(rows: Sequence[Sequence[float]], length: int, size: ImageSize | None) -> _Failure | None:
    width, height, unit = (GRID, GRID, f"0-{GRID}") if size is None else (size.width, size.height, f"{size}")
    for row in rows:
        if len(row) != length:
            reason = f"tuple {tuple(row)} has {len(row)} numbers, expected {length}"
            return _Failure(AnswerProblem.WRONG_LENGTH, reason)
        for x, y in (row[:2], row[2:]) if length == 4 else (row[:2],):
            if not (0 <= x <= width and 0 <= y <= height):
                return _Failure(AnswerProblem.OUT_OF_RANGE, f"point {(x, y)} lies outside {unit}")
        if length == 3 and not 0 < row[2] < float("inf"):
            return _Failure(AnswerProblem.BAD_DEPTH, f"depth {row[2]} is not a positive number of metres")
    return None
