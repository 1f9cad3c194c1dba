"""FlagEvalMM's files: `data.json` with the questions, prediction files with the answers; read and written.

A question: `{"question_id", "img_path": path or list, "question", "question_type", "answer", "options"?,
"image_width"?, "image_height"?, "mask_path"?}`. A prediction: `{"question_id", "answer"}`. Unknown fields are kept.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_rb.evaluation import tracespatial

QUESTION_TYPES = {
    "pointing": "pointing", "uvd": "uvd", "grounding": "box", "affordance": "box", "trace_2d": "trace_2d",
    "trace_3d": "trace_3d", "waypoints": "trace_3d", "trace_lift": "trace_3d", "measuring": "length",
    "multi_view": "pointing", "planning": "plan", "temporal_order": "plan", "hop": "hop",
}  # fmt: skip
"""Task of a training row -> how its answer is scored."""


def read_questions(folder: Path) -> list[dict[str, Any]]:
    """All questions of `folder`/data.json, or of that file itself; a copy of TraceSpatial-Bench is known by its files.

    Raises:
        ValueError: the file is not a list of objects with `question_id` and `question`, or ids repeat.
    """
    if tracespatial.is_trace_spatial(folder):
        return tracespatial.read_questions(folder)
    file = folder / "data.json" if folder.is_dir() else folder
    if not file.is_file():
        raise FileNotFoundError(f"there is no {file}; rb eval reads FlagEvalMM's data.json")
    rows = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(rows, list) or not all(
        isinstance(r, dict) and {"question_id", "question"} <= r.keys() for r in rows
    ):
        raise ValueError(f"{file} is not a list of objects with question_id and question")
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


def write_predictions(answers: Mapping[str, str], file: Path) -> None:
    """Answers by question id as a prediction file."""
    file.write_text(
        json.dumps([{"question_id": k, "answer": v} for k, v in answers.items()], indent=1), encoding="utf-8"
    )


def image_paths(question: Mapping[str, Any]) -> list[str]:
    """`img_path` as a list."""
    given: str | Sequence[str] = question.get("img_path") or []
    return [given] if isinstance(given, str) else list(given)


def as_row(question: Mapping[str, Any]) -> dict[str, Any]:
    """A question as a row that can be asked; pictures without a marker are shown before the text."""
    paths, text = image_paths(question), str(question["question"])
    missing = len(paths) - text.count("<image>")
    value = "<image>\n" * max(missing, 0) + text
    return {"id": str(question["question_id"]), "image": paths, "conversations": [{"from": "human", "value": value}]}


def _question(row: Mapping[str, Any]) -> dict[str, Any]:
    human = next(turn["value"] for turn in row["conversations"] if turn["from"] == "human")
    kind = QUESTION_TYPES.get(str(row.get("task")), "text")
    made = {
        "question_id": row["id"], "img_path": list(row["image"]), "question": human, "question_type": kind,
        "answer": row["answer"], "task": row.get("task"),
    }  # fmt: skip
    kept = {key: row[key] for key in ("hop", "metres", "steps", "order", "box", "progress") if key in row}
    return made | kept | ({"mask_path": row["mask"]} if "mask" in row else {})
