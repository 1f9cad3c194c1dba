"""Look at a data set: `rb data stats data.train=[my.jsonl] model.hf_path=DIR --out stats.json` counts sample sizes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_rb.app.planning import describe_histogram, read_histogram
from megatron_rb.config.compose import load_config


def main(argv: list[str]) -> int:
    """Write the histogram that `rb plan data=FILE` reads; refused rows are lines of a ledger beside it."""
    options = _parser().parse_intermixed_args(argv)
    out = Path(options.out)
    ledger = out.with_suffix(".ledger.jsonl")
    histogram = read_histogram(load_config(options.settings), ledger, progress=sys.stderr.isatty())
    histogram.save(out)
    print(f"{out}: {describe_histogram(histogram)}")
    print(histogram.source + (f"; see {ledger}" if ledger.exists() else ""))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rb data", description=__doc__)
    parser.add_argument("what", choices=["stats"])
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="key=value",
        help="settings of the run: experiment=, data.train=[...], model.hf_path=, data.seq_length=, ...",
    )
    parser.add_argument("--out", default="stats.json", metavar="FILE")
    return parser
