"""Do two runs of one recipe on different hardware agree? 0 they do, 1 they differ, 3 too noisy to tell."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console

from megatron_rb.comparison.runs.comparison import compare_runs
from megatron_rb.comparison.runs.folder import read_run
from megatron_rb.comparison.runs.gap import DEFAULT_THRESHOLD
from megatron_rb.comparison.runs.recipe import check_keys
from megatron_rb.comparison.runs.report import DEFINITION, EXIT_CODES, finite, show, write_report


def main(argv: list[str]) -> int:
    options = _parser().parse_args(argv)
    check_keys(options.allow)
    if options.threshold <= 0 or options.window < 0:
        raise ValueError(f"--threshold {options.threshold:g} and --window {options.window}: give values above 0")
    comparison = compare_runs(
        read_run(options.a, str(options.a)),
        read_run(options.b, str(options.b)),
        threshold=options.threshold,
        window=options.window,
        allowed=options.allow,
        check_recipe=not options.no_recipe,
    )
    if options.json:
        print(json.dumps(finite(comparison.as_json()), indent=1))
    else:
        show(comparison, Console())
    if options.out or not options.json:
        page = write_report(comparison, Path(options.out or "comparison"))
        print(f"report: {page}", file=sys.stderr)
    return EXIT_CODES[comparison.verdict]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rb compare runs", description=__doc__, epilog=DEFINITION)
    parser.add_argument("a", type=Path, help="run folder (or metrics.jsonl) of the reference")
    parser.add_argument("b", type=Path, help="run folder of the other run")
    parser.add_argument("--threshold", type=float, default=DEFAULT_THRESHOLD, metavar="PERCENT", help="default 0.62")
    parser.add_argument("--window", type=int, default=0, metavar="STEPS", help="the end; default a tenth, 50 or more")
    parser.add_argument(
        "--allow", action="append", default=[], metavar="KEY", help="setting or section that may differ"
    )
    parser.add_argument("--no-recipe", action="store_true", help="do not compare the recipes")
    parser.add_argument("--out", default="", metavar="DIR", help="of report.html and pictures; default comparison")
    parser.add_argument("--json", action="store_true", help="print the result for a script; a report only with --out")
    return parser
