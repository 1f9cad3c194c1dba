"""Hop scores as the model writes them, `<score>+12%</score>`, and read back; a failure says why."""

from __future__ import annotations

import re

from megatron_rb.spatial.answers import LONGEST_ANSWER, Answer, AnswerProblem, final_answer

QUANTISATIONS = ("percent", "tenths")
_TAGGED = re.compile(r"<score>\s*([^<]{0,64}?)\s*(?:</?score>|$)", re.IGNORECASE)
_NUMBER = re.compile(r"([-+]?)\s*(\d{1,12}(?:\.\d{0,12})?|\.\d{1,12})\s*%?")
_SIGNS = str.maketrans({"−": "-", "–": "-", "＋": "+", "％": "%", "﹣": "-", "－": "-"})


class ScoreAnswer(Answer[float]):
    @property
    def hop(self) -> float:
        """In [-1, 1]; 0 on failure, the value that moves no progress."""
        return self.value

    @property
    def or_nan(self) -> float:
        """The hop, NaN on failure: what reconstruction takes for an answer that moves nothing."""
        return self.hop if self.ok else float("nan")


def format_score(hop_label: float, quantisation: str = "percent") -> str:
    """Hop in [-1, 1] between score tags; zero carries no sign.

    Args:
        quantisation: `percent` (the paper: whole percent) or `tenths` (the released generator: one decimal).
    """
    if quantisation == "percent":
        percent = round(100 * hop_label)
        return f"<score>{percent:+d}%</score>" if percent else "<score>0%</score>"
    if quantisation != "tenths":
        raise ValueError(f"quantisation '{quantisation}' is not known; use {' or '.join(QUANTISATIONS)}")
    tenths = round(1000 * hop_label)
    return f"<score>{tenths / 10:+.1f}%</score>" if tenths else "<score>0.0%</score>"


def parse_score(text: str) -> ScoreAnswer:
    """The score of an answer: percent between score tags, with or without `%`, one or more decimals, any minus sign.

    Reasoning before the answer is left out. A missing end tag and the same score said twice are read; two different
    scores are a failure. Magnitudes above 100 % count as 100 %.
    """
    if len(text) > LONGEST_ANSWER:
        return _failed(
            AnswerProblem.TOO_LONG, f"the answer has {len(text)} characters, at most {LONGEST_ANSWER} are read"
        )
    found = _TAGGED.findall(text if "</think>" not in text else final_answer(text))
    if not found:
        return _failed(AnswerProblem.NOT_FOUND, "found 0 scores of the form <score>+NN%</score>, expected one")
    if len(found) > 1 and len(set(found)) > 1:
        return _failed(
            AnswerProblem.AMBIGUOUS, f"found {len(found)} scores of the form <score>+NN%</score>, expected one"
        )
    number = _NUMBER.fullmatch(found[0] if found[0].isascii() else found[0].translate(_SIGNS))
    if number is None:
        return _failed(AnswerProblem.NOT_A_NUMBER, f"the score {found[0]!r} is not a percentage")
    value = min(float(number[2]) / 100.0, 1.0)
    return ScoreAnswer(-value if number[1] == "-" else value)


def _failed(problem: AnswerProblem, reason: str) -> ScoreAnswer:
    return ScoreAnswer(0.0, reason, problem)
