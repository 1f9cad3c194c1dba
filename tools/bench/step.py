"""Time a training step beside transformers' own on the same small models."""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

from transformers.utils import logging as transformers_logging

from megatron_rb.app.session import adapt_megatron
from megatron_rb.shapes.families import FAMILIES


def main(argv: list[str]) -> int:
    options = _parser().parse_args(argv)
    adapt_megatron("cpu")

    from megatron_rb.bench.step import OURS, REFERENCES, compare_steps  # imports megatron-core

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    rows = []
    print(f"{'model':<12}{'side':<32}{'s / step':>10}{'CPU s':>10}{'tokens / s':>12}{'first loss':>12}", flush=True)
    for family in options.families:
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            result = compare_steps(Path(folder), family, options.steps, options.threads)
        for side, times in result.times.items():
            rate, loss = result.tokens / times.median, result.losses[side]
            print(f"{family:<12}{side:<32}{times.median:>10.3f}{times.median_cpu:>10.3f}{rate:>12.0f}{loss:>12.5f}")
        ratios = f"{result.wall_ratio:>10.3f}{result.cpu_ratio:>10.3f}"
        print(f"{family:<12}{'faster of ours / of theirs':<32}{ratios}", flush=True)
        compared = {"ours": result.faster(OURS), "reference": result.faster(REFERENCES)}
        ratio = {"wall_ratio": result.wall_ratio, "cpu_ratio": result.cpu_ratio}
        rows.append(asdict(result) | compared | ratio | {"threads": options.threads})
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=2))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rb bench step", description=__doc__)
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads of each side")
    parser.add_argument("--steps", type=int, default=5, metavar="K", help="timed steps of each side")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--json", default="", metavar="FILE", help="write every time")
    return parser
