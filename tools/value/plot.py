"""Draw progress curves with the frames below, one PNG per episode."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_rb.evaluation.value_plot import plot_episodes


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="rb value plot", description=__doc__)
    parser.add_argument("--curves", required=True, help="what rb value score wrote")
    parser.add_argument("--data", required=True, help="the episodes")
    parser.add_argument("--out", required=True, help="folder for <episode>.png")
    options = parser.parse_args(argv)
    for picture in plot_episodes(Path(options.curves), Path(options.data), Path(options.out)):
        print(picture)
    return 0
