"""Score a model, or recorded answers, on FlagEvalMM's data.json: table, json and an HTML report with pictures."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from megatron_rb.evaluation.answer_file import usage_in
from megatron_rb.evaluation.answer_source import add_arguments, answers_of
from megatron_rb.evaluation.benchmark_files import (
    as_row,
    expand_inferences,
    read_questions,
    write_predictions,
    write_questions,
)
from megatron_rb.evaluation.html_report import write_report
from megatron_rb.evaluation.scoring import score_all, summarise
from megatron_rb.launch.workers import start_workers


def main(argv: list[str]) -> int:
    options = _parser().parse_args(argv)
    data, out = Path(options.data), Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    if data.suffix == ".jsonl":
        rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
        write_questions(rows, out / "data.json")
        questions, root = read_questions(out), data.parent
    else:
        questions, root = read_questions(data), data if data.is_dir() else data.parent
    rows = [as_row(question) for question in questions]
    answers = answers_of(options, rows, root, out / "answers.jsonl", start_workers)
    usage = {} if options.answers else usage_in(out / "answers.jsonl")
    write_predictions(questions, answers, usage, out / "predictions.json")
    questions = expand_inferences(questions, answers)
    results = score_all(questions, answers, root)
    table = summarise(results)
    report = {"summary": table, "results": [vars(result) for result in results]}
    (out / "results.json").write_text(json.dumps(report, indent=1, default=dict))
    write_report(table, results, questions, answers, root, out / "report.html", options.pictures, options.curves)
    for kind, entry in table.items():
        shown = (
            f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}" for name, value in entry.items()
        )
        print(f"{kind:<16}{', '.join(shown)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rb eval", description=__doc__)
    parser.add_argument("--data", required=True, help="folder with data.json, such a file, or rows of a training file")
    parser.add_argument("--out", required=True, help="folder; an earlier run in it is continued")
    parser.add_argument("--pictures", type=int, default=60, help="most pictures in the report")
    add_arguments(parser, max_new_tokens=256, answers_help="prediction file of FlagEvalMM or of an earlier rb eval")
    parser.add_argument("--curves", type=Path, nargs="*", default=[], help="PNG files of rb value plot to show")
    return parser
