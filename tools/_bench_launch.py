"""Time how the launcher overcomes faults, on an emulated Slurm cluster of this machine."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="rb bench launch", description=__doc__)
    parser.add_argument("--json", default="", metavar="FILE", help="write every figure")
    options = parser.parse_args(argv)
    repository = Path(__file__).resolve().parents[1]
    if not (repository / "tests/slurm").is_dir():
        raise ValueError("rb bench launch needs tests/slurm of the repository; install with `pip install -e .`")
    sys.path.insert(0, str(repository))
    from tests.slurm.measure import main as measure

    figures = measure()
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=2))
    return 0
