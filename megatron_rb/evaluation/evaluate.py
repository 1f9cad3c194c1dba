"""One evaluation from files to files: questions in, scores, report and predictions out."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rb.data.answer_file import write_whole
from megatron_rb.data.json_object import object_of
from megatron_rb.data.media import shown_size
from megatron_rb.data.problems import BadSample
from megatron_rb.evaluation.benchmark_files import (
    Usage,
    expand_inferences,
    image_paths,
    read_questions,
    write_predictions,
    write_questions,
)
from megatron_rb.evaluation.html_report import write_report
from megatron_rb.scores.scoring import check_questions, score_all, summarise
from megatron_rb.scores.truth import Coordinates, coordinates_of_answers

ShownSize = Callable[[int, int], tuple[int, int]]
Table = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Benchmark:
    questions: list[dict[str, Any]]
    root: Path
    """Where paths of pictures start."""


def load_benchmark(data: Path, out: Path, coordinates: str = "", shown: ShownSize | None = None) -> Benchmark:
    """The questions of a folder with data.json, of such a file, of TraceSpatial-Bench, or of rows of a training file,
    all of them looked through.

    Args:
        out: folder; rows of a training file are written there as data.json.
        coordinates: one of `Coordinates`, how answers are to be read; empty = as the truth of each question is given.
        shown: (width, height) of a picture -> that of what the model is shown; needed for `shown-pixels`.

    Raises:
        ValueError: a question has an unknown kind, no readable truth or mask, or does not say of which picture its
            pixels are.
    """
    if coordinates == Coordinates.SHOWN and shown is None:
        raise ValueError(f"--coordinates {coordinates} needs the model's processor; give --ckpt or --hf")
    if data.suffix == ".jsonl":
        rows = _rows(data)
        out.mkdir(parents=True, exist_ok=True)
        write_questions(rows, out / "data.json")
        given, root = read_questions(out), data.parent
    else:
        given, root = read_questions(data), data if data.is_dir() else data.parent
    out.mkdir(parents=True, exist_ok=True)
    questions = [_with_unit(question, root, coordinates, shown) for question in given]
    check_questions(questions, root)
    return Benchmark(questions, root)


def publish(
    benchmark: Benchmark,
    answers: Mapping[str, str],
    usage: Mapping[str, Usage],
    out: Path,
    most_pictures: int,
    curves: Sequence[Path],
) -> tuple[Table, int]:
    """Score and write predictions.json, results.json and report.html into `out`.

    Returns:
        The table by kind, and the number of answers that belong to no question.
    """
    write_predictions(benchmark.questions, answers, usage, out / "predictions.json")
    questions = expand_inferences(benchmark.questions, answers)
    results = score_all(questions, answers, benchmark.root)
    strangers = len(answers.keys() - {str(question["question_id"]) for question in questions})
    table = summarise(results)
    report = {"summary": table, "answers_to_no_question": strangers, "results": [vars(result) for result in results]}
    write_whole(out / "results.json", json.dumps(report, indent=1, default=dict))
    write_report(table, results, questions, answers, benchmark.root, out / "report.html", most_pictures, curves)
    return table, strangers


def _rows(file: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = object_of(line)
        except ValueError as error:
            raise ValueError(f"{file}:{number} is not a row of a training file: {error}") from error
        missing = {"id", "image", "conversations", "answer"} - row.keys()
        if missing:
            raise ValueError(f"{file}:{number} lacks {', '.join(sorted(missing))}; rb eval needs rows with their truth")
        rows.append(row)
    if not rows:
        raise ValueError(f"{file} is empty; rb eval needs rows with their truth")
    return rows


def _with_unit(question: dict[str, Any], root: Path, coordinates: str, shown: ShownSize | None) -> dict[str, Any]:
    """The question with how its answers are to be read and, where they are pixels, the size of the picture."""
    made = question | ({"coordinates": coordinates} if coordinates else {})
    unit, has_size = coordinates_of_answers(made), "size" in made or {"image_width", "image_height"} <= made.keys()
    if unit in (Coordinates.GRID, Coordinates.FRACTIONS) or (has_size and unit is not Coordinates.SHOWN):
        return made
    try:
        size = shown_size(root / image_paths(made)[-1])
    except (IndexError, BadSample):  # then it cannot be asked either; the check says so where the size is needed
        return made
    seen = {"shown_size": list(shown(*size))} if unit is Coordinates.SHOWN and shown is not None else {}
    return made | ({} if has_size else {"size": list(size)}) | seen
