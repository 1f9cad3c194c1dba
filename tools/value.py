"""Dense value: `label` episodes into hop samples, `score` episodes with answers of a model, `plot` the curves."""

from __future__ import annotations

import argparse
import importlib

WHAT = ("label", "score", "plot")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="rb value", description=__doc__, add_help=not argv or argv[0] not in WHAT)
    parser.add_argument("what", choices=WHAT)
    options, rest = parser.parse_known_args(argv)
    return importlib.import_module(f"megatron_rb.tools._value_{options.what}").main(rest)
