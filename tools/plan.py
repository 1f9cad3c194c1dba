"""Predict the fastest layout for a model, a kind of device and a data set, e.g. `rb plan model=robobrain20_32b ...`."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from megatron_rb.app.plan_words import read_request
from megatron_rb.app.planning import build_task
from megatron_rb.bench.plan.published import write_report
from megatron_rb.planner.report import settings_text, table, write_json
from megatron_rb.planner.search import plan
from megatron_rb.planner.timeline import draw_timeline
from megatron_rb.shapes.published import missing_weights


def main(argv: list[str]) -> int:
    options = _parser().parse_intermixed_args(argv)
    if options.published:
        write_report(Path(options.published), options.device, print)
        return 0
    request = read_request(options.words)
    task = build_task(request)
    start, cpu = time.perf_counter(), time.process_time()
    predictions = plan(task)
    took = f"{time.perf_counter() - start:.1f} s ({time.process_time() - cpu:.1f} s of one core)"
    print(table(task, predictions))
    print(f"\nplanned in {took} for {request.histogram.source}")
    if request.note:
        print(request.note)
    missing = missing_weights(request.config.model.hf_path)
    if missing:
        print(missing)
    if options.json:
        write_json(task, predictions, Path(options.json))
    if options.yaml:
        Path(options.yaml).write_text(settings_text(task, predictions[0]))
        print(f"rb launch experiment=... settings={options.yaml}")
    if options.png:
        draw_timeline(task, predictions[0], Path(options.png))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rb plan", description=__doc__)
    parser.add_argument(
        "words",
        nargs="*",
        metavar="key=value",
        help="model= (or experiment=), cluster= (a device of conf/device or a yaml file), gpus=, data= (a histogram of "
        "`rb data stats`, or a mix of `rb bench train`; default images_16k), and where wanted seq_length=, "
        "max_patches=, global_batch_size=, dtype=, max_gpu_memory=, calibration=, tp=, pp=, vpp=, cp=, micro_batch=, "
        "sequence_parallel=, or settings of the run (model.freeze.vision=)",
    )
    parser.add_argument("--json", default="", metavar="FILE", help="write `best` and `ranked`")
    parser.add_argument("--yaml", default="", metavar="FILE", help="write the best as settings for `rb launch`")
    parser.add_argument("--png", default="", metavar="FILE", help="draw the simulated pipeline of the best")
    parser.add_argument("--published", default="", metavar="DIR", help="report on published layouts and on scaling")
    parser.add_argument("--device", default="h100", help="of that report")
    return parser
