"""Where do two captures of one step part, and is it rounding or a defect? 0 no defect, 1 a defect."""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import track

from megatron_rb.comparison.numerics.captures import open_captures
from megatron_rb.comparison.numerics.comparison import compare_captures
from megatron_rb.comparison.numerics.report import show, write_report
from megatron_rb.comparison.runs.report import finite


def main(argv: list[str]) -> int:
    options = _parser().parse_args(argv)
    captures = open_captures(options.a, options.b, options.step)
    progress = partial(track, description="comparing", console=Console(stderr=True), transient=True)
    comparison = compare_captures(*captures, track=progress)
    if options.json:
        print(json.dumps(finite(comparison.as_json()), indent=1))
    else:
        show(comparison, Console())
    if options.out or not options.json:
        page = write_report(comparison, Path(options.out or "comparison"))
        print(f"report: {page}", file=sys.stderr)
    return 1 if comparison.defects else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rb compare numerics", description=__doc__)
    parser.add_argument("a", type=Path, help="capture of the reference: its folder, or a run folder with captures")
    parser.add_argument("b", type=Path, help="capture of the other platform, kernels, type or layout")
    parser.add_argument("--step", type=int, default=0, metavar="N", help="default: the first step that both have")
    parser.add_argument("--out", default="", metavar="DIR", help="of report.html and pictures; default comparison")
    parser.add_argument("--json", action="store_true", help="print all results for a script; a report only with --out")
    return parser
