"""Measure the planned cut beside hand-made ones on two CPU processes; predicted and measured ratio side by side."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from megatron_rb.bench.plan.two_processes import HAND_MADE, markdown, run
from megatron_rb.launch.job import WORKER, JobSpec
from megatron_rb.launch.local import free_port
from megatron_rb.launch.main import run_job
from megatron_rb.platform import get_platform

MEASURE = "megatron_rb.bench.plan.measure:measure_cases"


def main(argv: list[str]) -> int:
    options = _parser().parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="bench-plan-") as folder:
        results = run(Path(folder), options.rounds, start_workers)
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


def start_workers(folder: Path, processes: int) -> int:
    port = free_port("127.0.0.1")
    return run_job(JobSpec(WORKER, (MEASURE, str(folder)), processes, folder, master_port=port))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rb bench plan", description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, metavar="K", help="timed steps of every layout")
    parser.add_argument("--out", default="", metavar="DIR", help="write two_processes.md and .json")
    return parser
