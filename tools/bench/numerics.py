"""Time what a capture adds to a step, and the comparison of two captures in the shapes of a real model."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from transformers.utils import logging as transformers_logging

from megatron_rb.app.session import adapt_megatron
from megatron_rb.shapes.families import FAMILIES
from megatron_rb.shapes.published import CONFIGS


def main(argv: list[str]) -> int:
    options = _parser().parse_args(argv)
    adapt_megatron("cpu")

    from megatron_rb.bench.numerics import capture_cost, comparison_cost  # imports megatron-core

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    results = []
    for family in options.families:
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            cost = capture_cost(Path(folder), family, options.rounds)
        plain, added = cost.times["plain"].median, cost.added("captured")
        print(
            f"{family:<12} step {plain:.3f} s; a captured step takes {added:+.1%}, {cost.num_bytes / 1e6:.1f} MB",
            end="",
        )
        print(f"; sampled 1 in 100: {cost.added_per_step(100):+.2%} per step (not due: {cost.added('not due'):+.2%})")
        results.append({"family": family, "added": added, "added_1_in_100": cost.added_per_step(100)})
    for model in options.models:
        with tempfile.TemporaryDirectory(prefix="bench-", dir=options.folder) as folder:
            compared = comparison_cost(Path(folder), model, CONFIGS[model])
        size, memory = compared.num_bytes / 1e9, compared.peak_memory / 1e9
        seconds = f"{compared.seconds:.1f} s ({compared.cpu_seconds:.1f} s of CPU)"
        print(f"{model:<16} two captures of {size:.2f} GB: {seconds}, peak memory {memory:.2f} GB")
        results.append(vars(compared))
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rb bench numerics", description=__doc__)
    parser.add_argument("--families", nargs="*", choices=FAMILIES, default=list(FAMILIES), help="small models")
    parser.add_argument("--rounds", type=int, default=10, metavar="K", help="timed steps of each side")
    parser.add_argument("--models", nargs="*", choices=list(CONFIGS), default=["RoboBrain2.0-3B"], help="of captures")
    parser.add_argument("--folder", default=None, metavar="DIR", help="for the captures, about 1 GB each")
    parser.add_argument("--json", default="", metavar="FILE", help="write the figures")
    return parser
