"""Predictions against questions: one score per question, summed up by kind; what cannot be read counts as wrong."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rb.scores import tracespatial, truth
from megatron_rb.scores.answer_metrics import (
    IOU_THRESHOLDS,
    box_iou,
    iou_at,
    mean_relative_accuracy,
    plan_match,
    ratio_success,
    read_plan,
)
from megatron_rb.scores.pointing import box_in_mask, flagevalmm_in_mask, point_in_mask
from megatron_rb.scores.trace_metrics import discrete_frechet, hausdorff, rmse_resampled, rmse_shared
from megatron_rb.scores.truth import Coordinates, Question
from megatron_rb.spatial.answers import AnswerProblem, parse_points, parse_points_with_depth
from megatron_rb.spatial.points import GRID
from megatron_rb.spatial.text_answers import parse_length, parse_number
from megatron_rb.value.answers import parse_score

NO_ANSWER = "no answer"
HALF = 0.5


@dataclass(frozen=True)
class Scored:
    question_id: str
    kind: str
    score: float
    """The main figure of the kind, 0 for a failed answer: share of points on the mask, IoU, success, equality."""
    measures: Mapping[str, float] = field(default_factory=dict)
    """Further figures, such as distances. Their means are over the answers that have them: a failed answer has those of
    a trace, but no depth and no hop."""
    failure: str = ""
    """Why the answer could not be read."""
    problem: str = ""


def score(question: Question, answer: str, root: Path) -> Scored:
    """Score one answer; any text gives a result.

    Raises:
        ValueError: the question itself is at fault: unknown kind, unreadable truth or mask.
    """
    return _scorer(question)(question, answer, root)


def score_all(questions: Sequence[Question], answers: Mapping[str, str], root: Path) -> list[Scored]:
    """One result per question; a question without an answer is scored as an empty one."""
    results = []
    for question in questions:
        key = str(question["question_id"])
        result = score(question, answers.get(key, ""), root)
        if key not in answers:
            result = replace(result, score=0.0, failure="nothing was answered", problem=NO_ANSWER)
        results.append(result)
    return results


def check_questions(questions: Sequence[Question], root: Path) -> None:
    """Look at kind, truth, unit of coordinates and mask of every question, before anybody is asked.

    Raises:
        ValueError: a question is at fault; it names it.
    """
    for question in questions:
        _scorer(question)(question, "", root)


def summarise(results: Sequence[Scored]) -> dict[str, dict[str, float | int | dict[str, int]]]:
    """By kind: number of questions, of failed answers and why, mean score, means of the further figures."""
    groups: dict[str, list[Scored]] = defaultdict(list)
    for result in results:
        groups[result.kind].append(result)
    return {kind: _summary(kind, group) for kind, group in sorted(groups.items())}


def _summary(kind: str, group: Sequence[Scored]) -> dict[str, float | int | dict[str, int]]:
    scores = [result.score for result in group]
    problems = Counter(result.problem for result in group if result.failure)
    entry: dict[str, float | int | dict[str, int]] = {
        "questions": len(group),
        "failed": problems.total(),
        "score": float(np.mean(scores)),
    }
    if kind == "box":
        entry |= {f"iou@{t:g}": iou_at(scores, t) for t in IOU_THRESHOLDS}
    if kind == "pointing":
        entry["half_or_more"] = float(np.mean([value >= HALF for value in scores]))  # EmbodiedVerse: correct
    for name in sorted({name for result in group for name in result.measures}):
        values = [result.measures[name] for result in group if name in result.measures]
        entry[name] = float(np.mean(values))
        if kind == tracespatial.KIND and name in ("start", "end"):
            entry[f"{name}_of_all"] = sum(values) / len(group)
    return entry | ({"problems": dict(problems)} if problems else {})


def _scorer(question: Question) -> Callable[[Question, str, Path], Scored]:
    kind = truth.kind_of(question)
    if kind not in SCORERS:
        raise ValueError(
            f"question {question['question_id']} has question_type {question.get('question_type', '')!r}; rb eval "
            f"knows {', '.join([*SCORERS, *truth.ALIASES])}"
        )
    return SCORERS[kind]


def _failed(question: Question, kind: str, answer: Any, measures: Mapping[str, float] | None = None) -> Scored:
    return Scored(str(question["question_id"]), kind, 0.0, measures or {}, answer.reason, str(answer.problem))


def _pointing(question: Question, answer: str, root: Path) -> Scored:
    """Point in mask; a box stands for all pixels in it."""
    mask, key = truth.mask_of(question, root), str(question["question_id"])
    if truth.coordinates_of_answers(question) is Coordinates.FLAGEVALMM:
        share, named = flagevalmm_in_mask(answer, mask)
        wrong = ("", "") if named else ("found no (x, y) in the last line", str(AnswerProblem.NOT_FOUND))
        return Scored(key, "pointing", share, {}, *wrong)
    read = truth.read_points(question, answer, partial(parse_points, anywhere=True))
    if read.ok:
        return Scored(key, "pointing", point_in_mask(read.points, mask))
    box = truth.read_box(question, answer)
    return Scored(key, "pointing", box_in_mask(box.box, mask)) if box.ok else _failed(question, "pointing", read)


def _uvd(question: Question, answer: str, root: Path) -> Scored:
    """Score: the point lies on the object's mask; depth error in centimetres beside it."""
    mask, true = truth.mask_of(question, root), truth.true_points(question, parse_points_with_depth)[0]
    read = truth.read_points(question, answer, parse_points_with_depth)
    if not read.ok:
        return _failed(question, "uvd", read)
    error = 100.0 * abs(float(read.points[0, 2]) - float(true[2]))
    hit = point_in_mask(read.points[:, :2], mask)
    return Scored(str(question["question_id"]), "uvd", hit, {"depth_error_cm": error})


def _box(question: Question, answer: str, root: Path) -> Scored:
    true, read = truth.true_box(question), truth.read_box(question, answer)
    if not read.ok:
        return _failed(question, "box", read)
    return Scored(str(question["question_id"]), "box", box_iou(read.box, true))


def _trace(kind: str, parse: Callable[..., Any]) -> Callable[[Question, str, Path], Scored]:
    def scorer(question: Question, answer: str, root: Path) -> Scored:
        """Score: the answer could be read. Distances on coordinates normalised to [0, 1] beside it; an answer that
        could not be read counts as the one point (0, 0), as in FlagEvalMM. Depth stays in metres and is apart."""
        true, read = truth.true_points(question, parse), truth.read_points(question, answer, parse)
        a, b = (read.points[:, :2] if read.ok else np.zeros((1, 2))) / GRID, true[:, :2] / GRID
        measures = {
            "dfd": discrete_frechet(a, b),
            "hd": hausdorff(a, b),
            "rmse": rmse_shared(a, b),
            "rmse_resampled": rmse_resampled(a, b),
        }
        if not read.ok:
            return _failed(question, kind, read, measures)
        if kind == "trace_3d":
            count = min(len(true), len(read.points))
            depth = np.abs(read.points[:count, 2] - true[:count, 2]).mean()
            measures["depth_error_cm"] = 100.0 * float(depth)
        return Scored(str(question["question_id"]), kind, 1.0, measures)

    return scorer


def _length(question: Question, answer: str, root: Path) -> Scored:
    """MSMU / Q-Spatial: right within a factor of two."""
    true, read = truth.true_length(question), parse_length(answer, truth.unit_of(question))
    if not read.ok:
        return _failed(question, "length", read)
    return Scored(str(question["question_id"]), "length", float(ratio_success(read.metres, true)))


def _number(question: Question, answer: str, root: Path) -> Scored:
    """VSI-Bench: mean relative accuracy by the paper, and beside it as the released code counts the border."""
    true, read = truth.true_number(question), parse_number(answer)
    if not read.ok:
        return _failed(question, "number", read, {"border_met": 0.0})
    measures = {"border_met": mean_relative_accuracy(read.value, true, border_met=True)}
    return Scored(str(question["question_id"]), "number", mean_relative_accuracy(read.value, true), measures)


def _plan(question: Question, answer: str, root: Path) -> Scored:
    """Equal as JSON where the truth is JSON (`plan_match`), else equal as text but for blanks around it."""
    key, true = str(question["question_id"]), str(question.get("answer", ""))
    if not answer.strip():
        return Scored(key, "plan", 0.0, {}, "the answer is empty", str(AnswerProblem.EMPTY))
    _, wrong = read_plan(true)
    if wrong:
        return Scored(key, "plan", float(answer.strip() == true.strip()))
    _, wrong = read_plan(answer)
    problem = str(AnswerProblem.NOT_FOUND) if wrong else ""
    return Scored(key, "plan", float(not wrong and plan_match(answer, true)), {}, wrong, problem)


def _choice(question: Question, answer: str, root: Path) -> Scored:
    """Multiple choice: the one letter of the answer is the true one; the share over all questions is the score.

    The text of an option counts as its letter. Several letters without a conclusion are a failure, where FlagEvalMM
    takes the first capital that is left.
    """
    key, true = str(question["question_id"]), truth.true_choice(question)
    letter, reason, problem = truth.choice_of(question, answer)
    return Scored(key, "multiple-choice", float(letter == true and not reason), {}, reason, problem)


def _yes_no(question: Question, answer: str, root: Path) -> Scored:
    """EmbodiedVerse: the last line begins with the true word."""
    key, true = str(question["question_id"]), str(question.get("answer", "")).strip().lower()
    if true not in ("yes", "no"):
        raise ValueError(f"question {key} is of type yes-no and its answer is {true!r}")
    last = (answer.strip().splitlines() or [""])[-1].strip(" *\"'").lower()
    read = last.startswith(("yes", "no"))
    reason = "" if read else "the last line begins with neither yes nor no"
    return Scored(key, "yes-no", float(last.startswith(true)), {}, reason, "" if read else str(AnswerProblem.NOT_FOUND))


def _hop(question: Question, answer: str, root: Path) -> Scored:
    """Score: the sign is right; absolute error of the hop in percent beside it."""
    true, read = truth.true_hop(question), parse_score(answer)
    if not read.ok:
        return _failed(question, "hop", read)
    right = float(np.sign(read.hop) == np.sign(round(true, 2)))
    return Scored(str(question["question_id"]), "hop", right, {"hop_error_percent": 100.0 * abs(read.hop - true)})


def _trace_spatial(question: Question, answer: str, root: Path) -> Scored:
    """TraceSpatial-Bench. Score: success; an answer that cannot be read has none and no further figures."""
    read = truth.read_points(question, answer, parse_points_with_depth)
    if not read.ok:
        tracespatial.check(question, root)
        return _failed(question, tracespatial.KIND, read)
    success, measures = tracespatial.score_answer(question, read.points, root)
    return Scored(str(question["question_id"]), tracespatial.KIND, float(success), measures)


SCORERS: Mapping[str, Callable[[Question, str, Path], Scored]] = {
    "pointing": _pointing,
    "uvd": _uvd,
    "box": _box,
    "trace_2d": _trace("trace_2d", parse_points),
    "trace_3d": _trace("trace_3d", parse_points_with_depth),
    "length": _length,
    "number": _number,
    "plan": _plan,
    "multiple-choice": _choice,
    "yes-no": _yes_no,
    "hop": _hop,
    tracespatial.KIND: _trace_spatial,
}
