"""Measure training steps, packing, conversions, recovery, data, kernels and captures; compare two results."""

from __future__ import annotations

import argparse
import importlib

WHAT = ("step", "train", "compare", "packing", "convert", "launch", "data", "kernels", "blocks", "plan", "numerics")


def main(argv: list[str]) -> int:
    # What comes after the first word is for the benchmark, its --help too.
    parser = argparse.ArgumentParser(prog="rb bench", description=__doc__, add_help=argv[:1] in (["-h"], ["--help"]))
    parser.add_argument("what", nargs="?", choices=WHAT, default="step", help="what is measured (default: step)")
    options, rest = parser.parse_known_args(argv)
    return importlib.import_module(f"megatron_rb.tools._bench_{options.what}").main(rest)
