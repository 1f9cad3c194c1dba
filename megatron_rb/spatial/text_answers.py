"""What a model wrote, read back: lengths, numbers, choices; a failure says why.

Several tries at one value that agree are read; what is not one clear answer is a failure, never a guess.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron_rb.spatial.answers import LONGEST_ANSWER, Answer, AnswerProblem, final_answer


class LengthAnswer(Answer[float]):
    @property
    def metres(self) -> float:
        """NaN on failure."""
        return self.value


class ChoiceAnswer(Answer[str]):
    @property
    def letter(self) -> str:
        """A capital letter; empty on failure."""
        return self.value


NumberAnswer = Answer[float]
"""The value is NaN on failure."""

_METRES = {
    "mm": 0.001,
    "millimeter": 0.001,
    "millimetre": 0.001,
    "cm": 0.01,
    "centimeter": 0.01,
    "centimetre": 0.01,
    "m": 1.0,
    "meter": 1.0,
    "metre": 1.0,
    "inch": 0.0254,
    "inches": 0.0254,
    "in": 0.0254,
    '"': 0.0254,
    "”": 0.0254,
    "foot": 0.3048,
    "feet": 0.3048,
    "ft": 0.3048,
    "'": 0.3048,
}
_SCALAR = re.compile(r"\\scalar\{\s*([-+]?[\d.,]*\d)\s*\}\s*\\distance_unit\{\s*([A-Za-z]+)\s*\}")
"""Q-Spatial Bench asks for `\\scalar{10} \\distance_unit{cm}`."""
_LENGTH = re.compile(
    r"(?<![\w.])([-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*([A-Za-z]+|[\"”'])?"
)


def parse_length(text: str, default_unit: str = "") -> LengthAnswer:
    """The one length of an answer such as `0.104m`, `10.4 cm`, `about 4 inches`, in metres.

    Several lengths are read when they say the same (`10 cm, that is 0.1 m`, to 2 %); else the answer is a failure.

    Args:
        default_unit: unit of a number that stands alone; empty = a number without unit is a failure.
    """
    if len(text) > LONGEST_ANSWER:
        return LengthAnswer(float("nan"), f"the answer has over {LONGEST_ANSWER} characters", AnswerProblem.TOO_LONG)
    text = final_answer(text)
    found = _SCALAR.findall(text) or _LENGTH.findall(text)
    known = [(number, _METRES[name]) for number, unit in found if (name := _unit(unit)) in _METRES]
    if not known and default_unit and len(found) == 1:
        known = [(found[0][0], _METRES[default_unit])]
    if not known:
        kind = AnswerProblem.UNKNOWN_UNIT if found else AnswerProblem.NOT_FOUND
        return LengthAnswer(float("nan"), "found no number with a unit of length (m, cm, mm, inch, foot)", kind)
    try:
        values = [float(number.replace(",", "")) * factor for number, factor in known]
    except ValueError as error:
        return LengthAnswer(float("nan"), f"a length is not a number: {error}", AnswerProblem.NOT_A_NUMBER)
    if max(values) - min(values) > 0.02 * max(map(abs, values)):
        return LengthAnswer(float("nan"), f"found the lengths {values} m, expected one", AnswerProblem.AMBIGUOUS)
    if not 0 <= values[0] < float("inf"):
        return LengthAnswer(float("nan"), f"{values[0]} m is not a length", AnswerProblem.OUT_OF_RANGE)
    return LengthAnswer(values[0])


_ANY_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")
_WORDS = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
    "twenty",
)


def parse_number(text: str) -> NumberAnswer:
    """The one number of an answer; the same number said twice is read, two different ones are a failure.

    An answer that is one of the words zero to twenty and nothing else is that number.
    """
    if len(text) > LONGEST_ANSWER:
        return NumberAnswer(float("nan"), f"the answer has over {LONGEST_ANSWER} characters", AnswerProblem.TOO_LONG)
    text = final_answer(text)
    word = text.strip().rstrip(".").lower()
    if word in _WORDS:
        return NumberAnswer(float(_WORDS.index(word)))
    found = {float(number.replace(",", "")) for number in _ANY_NUMBER.findall(text)}
    if len(found) == 1:
        return NumberAnswer(found.pop())
    problem = AnswerProblem.AMBIGUOUS if found else AnswerProblem.NOT_FOUND
    return NumberAnswer(float("nan"), f"found {len(found)} different numbers, expected one", problem)


_CONCLUSION = re.compile(
    r"(?:\b(?i:answer)(?:\s+(?i:is)|\s*:)|\\boxed\s*\{)(?:\\text\{|(?i:option|choice)\b|[\s:*({\"'])*([A-Z])\b(?!['\u2019])"
    r"(?:\W{0,3}(?i:or|and)\W{0,3}([A-Z])\b)?"
)
"""`The answer is B`, `**Answer:** (B)`, `\\boxed{B}`; and a second letter after an `or`."""
_LETTER = re.compile(
    r"\b([A-Z])\s+(?i:or|and)\s+([A-Z])\b|\(([A-Z])\)|\*\*([A-Z])\b|"
    r"(?i:option|choice)\s*(?i:is|:)?\s*\(?([A-Z])\b|\b([A-Z])(?=[).:,]|\*\*|\s*$)"
)
_SMALL = re.compile(r"\(?([a-z])\)?\.?")


def parse_choice(text: str, letters: Sequence[str] = "ABCD") -> ChoiceAnswer:
    """The letter of a multiple choice: `B`, `(B)`, `b`, `**B**`, `B. the cup`, `The answer is B`, `\\boxed{B}`.

    What is said to be the answer counts before letters that are only named.
    """
    text = final_answer(text[:LONGEST_ANSWER]).strip()
    if not text:
        return ChoiceAnswer("", "the answer is empty", AnswerProblem.EMPTY)
    small = _SMALL.fullmatch(text)
    text = small[1].upper() if small else text
    for pattern in (_CONCLUSION, _LETTER):
        found = {letter for match in pattern.findall(text) for letter in match if letter and letter in letters}
        if len(found) == 1:
            return ChoiceAnswer(found.pop())
        if found:
            said = ", ".join(sorted(found))
            return ChoiceAnswer("", f"found the choices {said}, expected one", AnswerProblem.AMBIGUOUS)
    return ChoiceAnswer("", f"found none of the choices {', '.join(letters)}", AnswerProblem.NOT_FOUND)


def _unit(word: str) -> str:
    lower = word.lower()
    return lower if lower in _METRES else lower.removesuffix("s")
