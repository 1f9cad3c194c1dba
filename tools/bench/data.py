"""Measure hop pairs, reconstruction, parsers and 3-D scoring on one core, beside what is aimed at."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from megatron_rb.bench.data import measure


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="rb bench data", description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="CPU time per line")
    parser.add_argument("--json", default="", metavar="FILE")
    options = parser.parse_args(argv)
    speeds = measure(options.seconds)
    print(f"{'what':<20}{'per CPU second':>20}{'aim':>14}")
    for speed in speeds:
        digits = 0 if speed.rate >= 100 else 2
        print(f"{speed.name:<20}{speed.rate:>14,.{digits}f} {speed.unit:<8}{speed.target:>12,.1f}")
    if options.json:
        Path(options.json).write_text(json.dumps([vars(speed) | {"rate": speed.rate} for speed in speeds], indent=2))
    return 0
