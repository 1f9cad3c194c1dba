"""Compare two runs of one recipe, or the tensors inside one step of each: runs, capture, numerics."""

from __future__ import annotations

import argparse
import importlib

WHAT = ("runs", "capture", "numerics")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="rb compare", description=__doc__, add_help=not argv or argv[0] not in WHAT)
    parser.add_argument("what", choices=WHAT, help="two loss curves; a step into files; two such steps")
    options, rest = parser.parse_known_args(argv)
    return importlib.import_module(f"megatron_rb.tools._compare_{options.what}").main(rest)
