"""Measure: a training step beside transformers', conversions beside `cp`, recovery on Slurm, data, kernels."""

from __future__ import annotations

import argparse
import importlib

WHAT = ("step", "convert", "launch", "data", "kernels", "blocks", "plan")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="rb bench", description=__doc__, add_help=False)
    parser.add_argument("what", nargs="?", choices=WHAT, default="step", help="what is measured (default: step)")
    options, rest = parser.parse_known_args(argv)
    return importlib.import_module(f"megatron_rb.tools._bench_{options.what}").main(rest)
