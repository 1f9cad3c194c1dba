"""Score a model, or recorded answers, on FlagEvalMM's data.json: table, json and an HTML report with pictures."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_rb.data.answer_file import usage_in
from megatron_rb.evaluation.benchmark_files import as_row
from megatron_rb.evaluation.evaluate import load_benchmark, publish
from megatron_rb.generation.answer_source import add_arguments, answers_of, shown_size
from megatron_rb.generation.questions import Questions
from megatron_rb.launch.workers import start_workers
from megatron_rb.scores.truth import Coordinates


def main(argv: list[str]) -> int:
    options = _parser().parse_args(argv)
    out = Path(options.out)
    missing = [str(path) for path in options.curves if not path.is_file()]
    if missing:
        raise ValueError(f"there is no file {', '.join(missing)} for --curves; rb value plot writes them")
    shown = shown_size(options) if options.coordinates == Coordinates.SHOWN else None
    benchmark = load_benchmark(Path(options.data), out, options.coordinates, shown)
    rows = [as_row(question) for question in benchmark.questions]
    answers = answers_of(options, Questions(rows, benchmark.root, out / "answers.jsonl"), start_workers)
    usage = {} if options.answers else usage_in(out / "answers.jsonl")
    table, strangers = publish(benchmark, answers, usage, out, options.pictures, options.curves)
    for kind, entry in table.items():
        figures = {name: f"{value:.4f}" if isinstance(value, float) else value for name, value in entry.items()}
        why = ", ".join(f"{count} {problem}" for problem, count in entry.get("problems", {}).items())
        figures |= {"failed": f"{entry['failed']} ({why})"} if why else {}
        print(f"{kind:<16}" + ", ".join(f"{name} {text}" for name, text in figures.items() if name != "problems"))
    print(f"report: {out / 'report.html'}")
    if strangers:
        print(f"{strangers} answers belong to no question of {options.data}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rb eval", description=__doc__)
    parser.add_argument("--data", required=True, help="folder with data.json, such a file, or rows of a training file")
    parser.add_argument("--out", required=True, help="folder; an earlier run in it is continued")
    parser.add_argument("--pictures", type=int, default=60, help="most pictures in the report")
    parser.add_argument(
        "--coordinates",
        default="",
        choices=["", *Coordinates],
        help="how answers give places; default as the truth is given, 0-1000 where it does not say",
    )
    add_arguments(parser, max_new_tokens=256, answers_help="prediction file of FlagEvalMM or of an earlier rb eval")
    parser.add_argument("--curves", type=Path, nargs="*", default=[], help="PNG files of rb value plot to show")
    return parser
