"""Time how the launcher overcomes faults, on an emulated Slurm cluster of this machine."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="rb bench launch", description=__doc__)
    parser.add_argument("--json", default="", metavar="FILE", help="write every figure")
    options = parser.parse_args(argv)
    from megatron_rb.bench.launch.measure import measure

    figures = measure()
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=2))
    return 0
