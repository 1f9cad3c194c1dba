"""Measure training steps on a declared mix of samples, or on your data, and write a report."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from megatron_rb.launch.workers import start_workers

MEASURE = "megatron_rb.bench.train.measure:measure"


def main(argv: list[str]) -> int:
    """Prepare a folder, start the processes on this machine, draw the report."""
    from transformers.utils import logging as transformers_logging

    from megatron_rb.bench.train.prepare import BenchRequest, default_folder, prepared
    from megatron_rb.bench.train.report import figures, write_report
    from megatron_rb.bench.train.result import load_result

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    options = _parser().parse_intermixed_args(argv)
    request = BenchRequest(
        tuple(options.settings),
        options.model,
        options.mix,
        options.steps,
        options.warmup,
        bool(options.baseline),
        options.peak_tflops,
    )
    folder = Path(options.out) if options.out else default_folder(time.strftime("%Y%m%d-%H%M%S"))
    with prepared(request, folder) as ready:
        code = start_workers(MEASURE, folder, ready.processes, ready.threads, ready.env)
    if code:
        return code
    result = load_result(folder)
    for name, value in figures(result):
        print(f"{name:<26}{value}")
    print(f"{write_report(result, folder)} (picture beside it; every figure in {folder / 'result.json'})")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rb bench train", description=__doc__)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings as `rb train` takes them")
    mixes = "images_8k, images_16k, video_16k, text_8k, tiny or a file"
    parser.add_argument("--mix", default="", metavar="MIX", help=mixes)
    parser.add_argument("--model", default="", metavar="M", help="small-FAMILY, RoboBrain2.0-3B, ..., or a folder")
    parser.add_argument("--steps", type=int, default=20, metavar="K", help="timed steps")
    parser.add_argument("--warmup", type=int, default=3, metavar="K", help="steps before them")
    parser.add_argument("--baseline", choices=["hf"], help="time transformers' own step on the same batch too")
    parser.add_argument("--peak-tflops", type=float, default=0.0, metavar="T", help="peak that MFU is a share of")
    parser.add_argument("--out", default="", metavar="DIR", help="default: runs/bench/ and the time")
    return parser
