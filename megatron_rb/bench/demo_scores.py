"""Pointing, depth and value of a model on held-out simulated episodes, beside answers that never look."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rb.builders.episodes import Episode, read_episodes
from megatron_rb.scores.scoring import score
from megatron_rb.scores.value_metrics import voc_minus, voc_plus
from megatron_rb.spatial import prompts
from megatron_rb.spatial.answers import parse_points, parse_points_with_depth
from megatron_rb.value.answers import format_score, parse_score
from megatron_rb.value.hops import hop_label, progress, sample_states

VIEW = "side"


@dataclass(frozen=True)
class DemoRequest:
    """How much is asked."""

    questions: int
    """Of pointing, and of uvd."""
    episodes: int | None = None
    """Held-out episodes of which all pairs of neighbouring frames are asked; None = all."""

    def __post_init__(self) -> None:
        for name, count in (("questions", self.questions), ("episodes", self.episodes)):
            if count is not None and count < 1:
                raise ValueError(f"{name} is {count}; it must be at least 1")


@dataclass(frozen=True)
class DemoScores:
    pointing_hit_rate: float
    depth_error_cm: float | None
    """Mean over the answers that could be read; None when there is none."""
    voc_plus: float
    """Mean over episodes, every neighbouring pair of frames."""
    voc_minus: float
    unreadable: int
    """Of all answers; they count as misses and move no progress."""
    answers: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class DemoQuestions:
    rows: list[dict]
    """Pointing and uvd rows of the held-out file, with their truth."""
    episodes: list[Episode]
    pairs: list[dict]
    """One row per ordered pair of neighbouring frames."""


def demo_questions(data: Path, request: DemoRequest) -> DemoQuestions:
    """What is asked: the first pointing and uvd rows of `data`/heldout.jsonl, all pairs of its first episodes."""
    rows = _rows(data / "heldout.jsonl")
    chosen = [
        row for task in ("pointing", "uvd") for row in [r for r in rows if r["task"] == task][: request.questions]
    ]
    episodes = read_episodes(data / "media/heldout/episodes")[: request.episodes]
    return DemoQuestions(chosen, episodes, [row for episode in episodes for row in _pair_rows(episode, data)])


def score_demo(questions: DemoQuestions, answers: Mapping[str, str], data: Path) -> DemoScores:
    """Score answers by row id; a missing one counts as unreadable."""
    results = []
    for row in questions.rows:
        question = {
            "question_id": row["id"],
            "question_type": row["task"],
            "answer": row["answer"],
            "mask_path": row["mask"],
        }
        results.append(score(question, answers.get(row["id"], ""), data))
    errors = [result.measures["depth_error_cm"] for result in results if "depth_error_cm" in result.measures]
    read = {row["id"]: parse_score(answers.get(row["id"], "")) for row in questions.pairs}
    plus, minus = [], []
    for episode in questions.episodes:
        steps = range(len(episode.frames) - 1)
        plus.append(voc_plus([read[_key(episode, t, t + 1)].or_nan for t in steps]))
        minus.append(voc_minus([read[_key(episode, t + 1, t)].or_nan for t in steps]))
    hits = [result.score for result in results if result.kind == "pointing"]
    unreadable = sum(bool(result.failure) for result in results) + sum(not answer.ok for answer in read.values())
    return DemoScores(
        float(np.mean(hits)),
        float(np.mean(errors)) if errors else None,
        float(np.mean(plus)),
        float(np.mean(minus)),
        unreadable,
        len(results) + len(read),
    )


def constant_answers(questions: DemoQuestions, data: Path) -> dict[str, str]:
    """The mean training point, depth and hop as the answer to everything.

    A constant gain makes every curve rise, so its VOC+ is 1 and its VOC- 0; only both together tell looking from not.
    """
    rows = _rows(data / "train.jsonl")
    points = np.concatenate([parse_points(row["answer"]).points for row in rows if row["task"] == "pointing"])
    solid = np.concatenate([parse_points_with_depth(row["answer"]).points for row in rows if row["task"] == "uvd"])
    hop = float(np.mean([row["hop"] for row in rows if row["task"] == "hop"]))
    texts = {
        "pointing": prompts.format_points(np.rint(points.mean(axis=0))[None]),
        "uvd": prompts.format_points_with_depth(solid.mean(axis=0)[None]),
        "hop": format_score(hop),
    }
    return {row["id"]: texts[row["task"]] for row in [*questions.rows, *questions.pairs]}


def write_demo_questions(data: Path, request: DemoRequest, file: Path) -> None:
    """All that is asked as rows of a training file, beside the held-out file, for `rb eval`."""
    questions = demo_questions(data, request)
    lines = (json.dumps(row) + "\n" for row in [*questions.rows, *questions.pairs])
    file.write_text("".join(lines), encoding="utf-8")


def evaluate_demo(data: Path, request: DemoRequest, answers: Mapping[str, str]) -> dict[str, Any]:
    """Scores of the answers by row id, and of the constant answer."""
    questions = demo_questions(data, request)
    return {
        "model": score_demo(questions, answers, data).as_json(),
        "constant": score_demo(questions, constant_answers(questions, data), data).as_json(),
    }


def _pair_rows(episode: Episode, data: Path) -> list[dict]:
    states = sample_states(episode.key_frames())
    phi = np.interp(range(len(episode.frames)), states, progress(len(states)))
    rows = []
    for t in range(len(episode.frames) - 1):
        for before, after in ((t, t + 1), (t + 1, t)):
            images = [episode.frames[k].views[VIEW].image.relative_to(data).as_posix() for k in (before, after)]
            text = prompts.hop(episode.instruction, [f"BEFORE {VIEW}", f"AFTER {VIEW}"])
            hop = hop_label(float(phi[before]), float(phi[after]))
            answer = format_score(hop)
            turns = [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]
            key = _key(episode, before, after)
            rows.append(
                {"id": key, "task": "hop", "image": images, "conversations": turns, "answer": answer, "hop": hop}
            )
    return rows


def _key(episode: Episode, before: int, after: int) -> str:
    return f"voc_{episode.name}_{before:02d}_{after:02d}"


def _rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
