"""Time imports and exports of checkpoints of real shapes beside `cp` of the same files, and their peak memory."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from megatron_rb.bench.convert import ConvertResult, compare_with_copy, cut_depth
from megatron_rb.shapes.published import CONFIGS

CASES = {
    "RoboBrain2.0-3B": 0,
    "RoboBrain2.0-32B": 4,
    "RoboBrain2.0-7B": 4,
    "RoboBrain2.5-4B": 4,
    "RoboBrain2.5-8B": 4,
}
"""Layers of each kind that are kept; 0 = all."""
EQUAL = {None: "", True: "  equal to the source", False: "  NOT EQUAL to the source"}
DEFAULT = ["RoboBrain2.0-3B", "RoboBrain2.0-32B"]


def main(argv: list[str]) -> int:
    options = _parser().parse_args(argv)
    numbers = f"{'GB':>7}{'largest GB':>11}{'cp s':>8}{'ours s':>8}{'ratio':>7}{'best':>7}{'peak GB':>9}"
    print(f"{'model':<18}{'way':<8}{numbers}", flush=True)
    results = []
    for name in options.models:
        layers = CASES[name] if options.layers is None else options.layers
        config = cut_depth(CONFIGS[name], layers) if layers else CONFIGS[name]
        label = name.removeprefix("RoboBrain") + (f", {layers} layers" if layers else "")
        results += compare_with_copy(Path(options.folder), label, config, options.rounds, _show)
    if options.json:
        Path(options.json).write_text(json.dumps([result.as_json() for result in results], indent=2))
    return 0


def _show(result: ConvertResult) -> None:
    copies, conversions = sorted(result.copies), sorted(timing.seconds for timing in result.conversions)
    middle = len(copies) // 2
    print(
        f"{result.model:<18}{result.direction:<8}{result.num_bytes / 1e9:>7.2f}{result.largest_tensor / 1e9:>11.2f}"
        f"{copies[middle]:>8.2f}{conversions[middle]:>8.2f}{result.ratio:>7.2f}{result.best_ratio:>7.2f}"
        f"{result.peak_memory / 1e9:>9.2f}{EQUAL[result.round_trip_equal]}",
        flush=True,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rb bench convert", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(CASES), default=DEFAULT)
    parser.add_argument("--layers", type=int, metavar="N", help="layers of each kind that are kept; 0 = all")
    parser.add_argument("--rounds", type=int, default=5, metavar="K", help="counted rounds")
    parser.add_argument(
        "--folder", default=tempfile.gettempdir(), metavar="DIR", help="where there is room on the disk"
    )
    parser.add_argument("--json", default="", metavar="FILE", help="write every time")
    return parser
