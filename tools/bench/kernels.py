"""Time the kernels as shares of a GPU's measured ceilings, on a CPU beside transformers; --aot counts machine code."""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from megatron_rb.bench.kernels.run import Report, count_machine_code, measure_cpu, measure_gpu
from megatron_rb.platform import get_platform
from megatron_rb.platform.base import module_exists


def main(argv: list[str]) -> int:
    options = _parser().parse_args(argv)
    if options.aot:
        if not module_exists("triton"):
            raise ValueError("--aot needs triton, which is not installed; pip install triton")
        _write_json(options.json, count_machine_code())
        return 0
    transformers_logging.disable_progress_bar()
    platform, date = get_platform(), datetime.date.today().isoformat()
    if platform.name == "cuda":
        report = measure_gpu(platform, date)
    else:
        print(f"no GPU ({platform.name}): speed on a GPU is not measured here, only the CPU path", flush=True)
        report = measure_cpu(platform, date, options.rounds)
    _write_json(options.json, report.results)
    _write_report(report, options.out or ("benchmarks/kernels" if platform.name == "cuda" else ""))
    return 0


def _write_json(path: str, results: Any) -> None:
    if path:
        Path(path).write_text(json.dumps(results, indent=2) + "\n")


def _write_report(report: Report, folder: str) -> None:
    if folder:
        for path in report.write(Path(folder)):
            print(f"wrote {path}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rb bench kernels", description=__doc__)
    parser.add_argument("--aot", action="store_true", help="compile for sm_80, sm_90 and sm_100 and count instructions")
    parser.add_argument("--rounds", type=int, default=5, metavar="K", help="timed rounds on CPU")
    parser.add_argument("--json", default="", metavar="FILE", help="write every number")
    parser.add_argument(
        "--out",
        default="",
        metavar="DIR",
        help="write <card>-<date>.json, .md and .png there (default on a GPU: benchmarks/kernels)",
    )
    return parser
