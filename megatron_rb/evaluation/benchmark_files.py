"""FlagEvalMM's files: `data.json` with the questions, prediction files with the answers; read and written.

A question: `{"question_id", "img_path": path or list, "question", "question_type", "answer", "options"?,
"image_width"?, "image_height"?, "mask_path"?}`; pictures stand in the text as `<image 1>`. A prediction:
`{"question_id", "question", "answer", "reason", "usage"}`; several tries are `"answer": {"inference_0": ...}`. Unknown
fields are kept.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from megatron_rb.data.answer_file import write_whole
from megatron_rb.scores import tracespatial

QUESTION_TYPES = {
    "pointing": "pointing",
    "uvd": "uvd",
    "grounding": "box",
    "affordance": "box",
    "trace_2d": "trace_2d",
    "trace_3d": "trace_3d",
    "waypoints": "trace_3d",
    "trace_lift": "trace_3d",
    "trace_object": "trace_3d",
    "measuring": "length",
    "multi_view": "pointing",
    "planning": "plan",
    "temporal_order": "plan",
    "hop": "hop",
}
"""Task of a training row -> how its answer is scored."""
NUMBERED = re.compile(r"<image (\d+)>")
END_OF_THOUGHT = "</think>"
Usage = tuple[int, int]
"""Tokens of the prompt and of the answer."""


def read_questions(folder: Path) -> list[dict[str, Any]]:
    """All questions of `folder`/data.json, or of that file itself; a copy of TraceSpatial-Bench is known by its files.

    Raises:
        ValueError: the file is not a list of objects with `question_id` and `question`, it is empty, or ids repeat.
    """
    if tracespatial.is_trace_spatial(folder):
        return tracespatial.read_questions(folder)
    file = folder / "data.json" if folder.is_dir() else folder
    if not file.is_file():
        raise FileNotFoundError(f"there is no {file}; rb eval reads FlagEvalMM's data.json")
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(rows, list) or not all(
        isinstance(r, dict) and {"question_id", "question"} <= r.keys() for r in rows
    ):
        raise ValueError(f"{file} is not a list of objects with question_id and question")
    if not rows:
        raise ValueError(f"{file} holds no question")
    ids = [str(row["question_id"]) for row in rows]
    if len(set(ids)) < len(ids):
        twice = next(key for key in ids if ids.count(key) > 1)
        raise ValueError(f"{file} has the question_id {twice!r} more than once; answers could not be told apart")
    return rows


def write_questions(rows: Iterable[Mapping[str, Any]], file: Path) -> int:
    """Rows of a training file (ShareGPT with ground truth beside it) as a data.json; returns how many.

    Only the first human turn is asked; `<image>` markers stay in the question.
    """
    questions = [_question(row) for row in rows]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(questions, indent=1), encoding="utf-8")
    return len(questions)


def write_predictions(
    questions: Sequence[Mapping[str, Any]], answers: Mapping[str, str], usage: Mapping[str, Usage], file: Path
) -> None:
    """A prediction file as FlagEvalMM's own adapters write it (`<task>.json` in its output folder).

    Its evaluator wants one entry per question, so one without an answer gets an empty one; it splits thoughts from the
    answer, and reads token counts from every entry. Those are left out where nobody counted.
    """
    rows = []
    for question in questions:
        key = str(question["question_id"])
        tries = [answers[f"{key}_inference_{n}"] for n in _tries(key, answers)]
        rows.append(_prediction(question, answers.get(key, ""), tries, usage))
    text = json.dumps(rows, indent=2, ensure_ascii=False)
    write_whole(file, text.encode(errors="replace").decode())  # half a surrogate pair has no UTF-8


def _prediction(
    question: Mapping[str, Any], text: str, tries: Sequence[str], usage: Mapping[str, Usage]
) -> dict[str, Any]:
    key = str(question["question_id"])
    reason, end, answer = text.partition(END_OF_THOUGHT)
    row: dict[str, Any] = {"question_id": key, "question": prompt_text(question)}
    row |= {"answer": answer, "reason": reason + end} if end else {"answer": text, "reason": ""}
    if tries:
        row |= {"answer": {f"inference_{n}": said for n, said in enumerate(tries)}}
    if key in usage:
        prompt, completion = usage[key]
        row["usage"] = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return row


def expand_inferences(questions: Sequence[dict[str, Any]], answers: Mapping[str, str]) -> list[dict[str, Any]]:
    """Questions that were answered several times, once for each (`<id>_inference_<n>`, as FlagEvalMM counts them)."""
    expanded: list[dict[str, Any]] = []
    for question in questions:
        key = str(question["question_id"])
        expanded += [question | {"question_id": f"{key}_inference_{n}"} for n in _tries(key, answers)] or [question]
    return expanded


def _tries(key: str, answers: Mapping[str, str]) -> Iterator[int]:
    """Numbers of the several answers to one question."""
    return itertools.takewhile(lambda n: f"{key}_inference_{n}" in answers, itertools.count())


def image_paths(question: Mapping[str, Any]) -> list[str]:
    """`img_path` as a list."""
    given: str | Sequence[str] = question.get("img_path") or []
    return [given] if isinstance(given, str) else list(given)


def prompt_text(question: Mapping[str, Any]) -> str:
    """The question with its options below, as FlagEvalMM asks it."""
    options = zip(ascii_uppercase, question.get("options") or [], strict=False)
    return str(question["question"]) + "".join(f"\n{letter}. {text}" for letter, text in options)


def as_row(question: Mapping[str, Any]) -> dict[str, Any]:
    """A question as a row that can be asked; `<image 2>` shows the second picture, unnamed ones come first."""
    paths, text = image_paths(question), prompt_text(question)
    numbers = list(dict.fromkeys(int(n) for n in NUMBERED.findall(text)))
    if numbers:
        unknown = [n for n in numbers if not 1 <= n <= len(paths)]
        if unknown:
            raise ValueError(
                f"question {question['question_id']} shows <image {unknown[0]}>, but its img_path names {len(paths)}"
            )
        paths = [path for n, path in enumerate(paths, 1) if n not in numbers] + [paths[n - 1] for n in numbers]
        for n in numbers:  # named a second time, a picture is spoken of, not shown again
            text = text.replace(f"<image {n}>", "<image>", 1).replace(f"<image {n}>", f"image {n}")
    missing = len(paths) - text.count("<image>")
    value = "<image>\n" * max(missing, 0) + text
    return {"id": str(question["question_id"]), "image": paths, "conversations": [{"from": "human", "value": value}]}


def _question(row: Mapping[str, Any]) -> dict[str, Any]:
    human = next(turn["value"] for turn in row["conversations"] if turn["from"] == "human")
    kind = QUESTION_TYPES.get(str(row.get("task")), "text")
    made = {
        "question_id": row["id"],
        "img_path": list(row["image"]),
        "question": human,
        "question_type": kind,
        "answer": row["answer"],
        "task": row.get("task"),
    }
    kept = {key: row[key] for key in ("hop", "metres", "unit", "steps", "order", "box", "progress") if key in row}
    points = row.get("points")
    if isinstance(points, dict) and "frame" in points:  # its answer is in pixels
        kept |= {key: points[key] for key in ("frame", "size") if key in points}
    return made | kept | ({"mask_path": row["mask"]} if "mask" in row else {})
