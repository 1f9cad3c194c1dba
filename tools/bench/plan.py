"""Measure the planned cut beside hand-made ones on two CPU processes; predicted and measured ratio side by side."""

from __future__ import annotations

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path

from megatron_rb.bench.plan.two_processes import HAND_MADE, MEASURE, markdown, run
from megatron_rb.launch.workers import start_workers
from megatron_rb.platform import get_platform


def main(argv: list[str]) -> int:
    options = _parser().parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="bench-plan-") as folder:
        results = run(Path(folder), options.rounds, partial(start_workers, MEASURE, threads=1))
    for result in results:
        for row in result.rows:
            seconds = f"{row.predicted:>8.3f} s predicted {row.measured:>8.3f} s ± {row.spread:.3f} measured"
            print(f"{result.case:<11}{seconds}  {row.role}: {row.layout}")
        for role in HAND_MADE:
            predicted, measured = result.ratio(role)
            print(f"{result.case:<11}{role} over planned: {predicted:.3f} predicted, {measured:.3f} measured")
    if options.out:
        machine = ", ".join(f"{name} {value}" for name, value in get_platform("cpu").info().items())
        out = Path(options.out)
        out.mkdir(parents=True, exist_ok=True)
        (out / "two_processes.md").write_text(markdown(results, machine, options.rounds))
        (out / "two_processes.json").write_text(json.dumps([result.as_json() for result in results], indent=1))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rb bench plan", description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, metavar="K", help="timed steps of every layout")
    parser.add_argument("--out", default="", metavar="DIR", help="write two_processes.md and .json")
    return parser
