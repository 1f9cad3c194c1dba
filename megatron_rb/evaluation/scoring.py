"""Predictions against questions: one score per question, summed up by kind; what cannot be read counts as wrong."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from megatron_rb.evaluation import tracespatial
from megatron_rb.evaluation.answer_metrics import (
    IOU_THRESHOLDS,
    box_iou,
    iou_at,
    mean_relative_accuracy,
    plan_match,
    ratio_success,
)
from megatron_rb.evaluation.pointing import point_in_mask
from megatron_rb.evaluation.trace_metrics import discrete_frechet, hausdorff, rmse_resampled, rmse_shared
from megatron_rb.spatial.answers import (
    parse_box,
    parse_choice,
    parse_length,
    parse_number,
    parse_points,
    parse_points_with_depth,
)
from megatron_rb.spatial.points import GRID
from megatron_rb.value.answers import parse_score


@dataclass(frozen=True)
class Scored:
    question_id: str
    kind: str
    score: float
    """The main figure of the kind, 0 for a failed answer: share of points on the mask, IoU, success, equality."""
    measures: Mapping[str, float] = field(default_factory=dict)
    """Further figures, such as distances; a failed answer has none, so their means are over the answers that were read
    (the number of failed ones stands beside them)."""
    failure: str = ""
    """Why the answer could not be read."""
    problem: str = ""


def score(question: Mapping[str, Any], answer: str, root: Path) -> Scored:
    """Score one answer; any text gives a result.

    Raises:
        ValueError: the question itself is at fault: unknown kind, unreadable truth or mask.
    """
    kind = str(question.get("question_type", ""))
    if kind not in SCORERS:
        raise ValueError(
            f"question {question['question_id']} has question_type {kind!r}; rb eval knows {', '.join(SCORERS)}"
        )
    return SCORERS[kind](question, answer, root)


def score_all(questions: Sequence[Mapping[str, Any]], answers: Mapping[str, str], root: Path) -> list[Scored]:
    """One result per question; a question without an answer is scored as an empty one."""
    return [score(question, answers.get(str(question["question_id"]), ""), root) for question in questions]


def summarise(results: Sequence[Scored]) -> dict[str, dict[str, float | int | dict[str, int]]]:
    """By kind: number of questions, of failed answers and why, mean score, means of the further figures."""
    groups: dict[str, list[Scored]] = defaultdict(list)
    for result in results:
        groups[result.kind].append(result)
    table: dict[str, dict[str, float | int | dict[str, int]]] = {}
    for kind, group in sorted(groups.items()):
        scores = [result.score for result in group]
        problems = Counter(result.problem for result in group if result.failure)
        entry: dict[str, float | int | dict[str, int]] = {
            "questions": len(group), "failed": problems.total(), "score": float(np.mean(scores)),
        }  # fmt: skip
        if kind == "box":
            entry |= {f"iou@{t:g}": iou_at(scores, t) for t in IOU_THRESHOLDS}
        for name in sorted({name for result in group for name in result.measures}):
            values = [result.measures[name] for result in group if name in result.measures]
            entry[name] = float(np.mean(values))
        table[kind] = entry | ({"problems": dict(problems)} if problems else {})
    return table


def _failed(question: Mapping[str, Any], kind: str, answer: Any) -> Scored:
    return Scored(str(question["question_id"]), kind, 0.0, {}, answer.reason, str(answer.problem))


def _pointing(question: Mapping[str, Any], answer: str, root: Path) -> Scored:
    read = parse_points(answer)
    if not read.ok:
        return _failed(question, "pointing", read)
    return Scored(str(question["question_id"]), "pointing", point_in_mask(read.points, _mask(question, root)))


def _uvd(question: Mapping[str, Any], answer: str, root: Path) -> Scored:
    """Score: the point lies on the object's mask; depth error in centimetres beside it."""
    read = parse_points_with_depth(answer)
    if not read.ok:
        return _failed(question, "uvd", read)
    truth = parse_points_with_depth(str(question["answer"])).points[0]
    hit = point_in_mask(read.points[:, :2], _mask(question, root))
    error = 100.0 * abs(float(read.points[0, 2]) - float(truth[2]))
    return Scored(str(question["question_id"]), "uvd", hit, {"depth_error_cm": error})


def _box(question: Mapping[str, Any], answer: str, root: Path) -> Scored:
    read = parse_box(answer)
    if not read.ok:
        return _failed(question, "box", read)
    truth = parse_box(str(question["answer"]))
    if not truth.ok:
        raise ValueError(f"question {question['question_id']}: its true box cannot be read: {truth.reason}")
    return Scored(str(question["question_id"]), "box", box_iou(read.box, truth.box))


def _trace(kind: str, parse: Callable[[str], Any]) -> Callable[[Mapping[str, Any], str, Path], Scored]:
    def scorer(question: Mapping[str, Any], answer: str, root: Path) -> Scored:
        """Distances on coordinates normalised to [0, 1]; depth, where there is one, stays in metres and is apart."""
        read = parse(answer)
        if not read.ok:
            return _failed(question, kind, read)
        truth = parse(str(question["answer"])).points
        a, b = read.points[:, :2] / GRID, truth[:, :2] / GRID
        measures = {
            "dfd": discrete_frechet(a, b), "hd": hausdorff(a, b), "rmse": rmse_shared(a, b),
            "rmse_resampled": rmse_resampled(a, b),
        }  # fmt: skip
        if kind == "trace_3d":
            count = min(len(truth), len(read.points))
            depth = np.abs(read.points[:count, 2] - truth[:count, 2]).mean()
            measures["depth_error_cm"] = 100.0 * float(depth)
        return Scored(str(question["question_id"]), kind, 1.0, measures)  # the score of a trace: it could be read

    return scorer


def _length(question: Mapping[str, Any], answer: str, root: Path) -> Scored:
    """MSMU / Q-Spatial: right within a factor of two."""
    read = parse_length(answer)
    if not read.ok:
        return _failed(question, "length", read)
    truth = float(question["metres"]) if "metres" in question else parse_length(str(question["answer"])).metres
    return Scored(str(question["question_id"]), "length", float(ratio_success(read.metres, truth)))


def _number(question: Mapping[str, Any], answer: str, root: Path) -> Scored:
    """VSI-Bench: mean relative accuracy."""
    read = parse_number(answer)
    if not read.ok:
        return _failed(question, "number", read)
    truth = parse_number(str(question["answer"])).value
    return Scored(str(question["question_id"]), "number", mean_relative_accuracy(read.value, truth))


def _plan(question: Mapping[str, Any], answer: str, root: Path) -> Scored:
    truth = str(question["answer"])
    right = answer.strip() == truth.strip() or plan_match(answer, truth)
    empty = "" if answer.strip() else "the answer is empty"
    return Scored(str(question["question_id"]), "plan", float(right and not empty), {}, empty, "empty" if empty else "")


def _choice(question: Mapping[str, Any], answer: str, root: Path) -> Scored:
    read = parse_choice(answer)
    if not read.ok:
        return _failed(question, "multiple-choice", read)
    right = read.letter == parse_choice(str(question["answer"])).letter
    return Scored(str(question["question_id"]), "multiple-choice", float(right))


def _hop(question: Mapping[str, Any], answer: str, root: Path) -> Scored:
    """Score: the sign is right; absolute error of the hop in percent beside it."""
    read = parse_score(answer)
    if not read.ok:
        return _failed(question, "hop", read)
    truth = float(question["hop"]) if "hop" in question else parse_score(str(question["answer"])).hop
    right = float(np.sign(read.hop) == np.sign(round(truth, 2)))
    return Scored(str(question["question_id"]), "hop", right, {"hop_error_percent": 100.0 * abs(read.hop - truth)})


def _mask(question: Mapping[str, Any], root: Path) -> np.ndarray:
    try:
        with Image.open(root / str(question["mask_path"])) as image:
            return np.asarray(image.convert("1"))
    except (KeyError, OSError) as error:
        raise ValueError(f"question {question['question_id']} has no readable mask_path: {error}") from error


def _trace_spatial(question: Mapping[str, Any], answer: str, root: Path) -> Scored:
    """TraceSpatial-Bench. Score: success; an answer that cannot be read has none and no further figures."""
    read = parse_points_with_depth(answer)
    if not read.ok:
        return _failed(question, tracespatial.KIND, read)
    success, measures = tracespatial.score_answer(question, read.points, root)
    return Scored(str(question["question_id"]), tracespatial.KIND, float(success), measures)


SCORERS: Mapping[str, Callable[[Mapping[str, Any], str, Path], Scored]] = {
    "pointing": _pointing,
    "point": _pointing,  # FlagEvalMM's name
    "uvd": _uvd,
    "box": _box,
    "trace_2d": _trace("trace_2d", parse_points),
    "trace_3d": _trace("trace_3d", parse_points_with_depth),
    "length": _length,
    "number": _number,
    "plan": _plan,
    "multiple-choice": _choice,
    "hop": _hop,
    tracespatial.KIND: _trace_spatial,
}
