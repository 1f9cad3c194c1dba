"""Key-framed episodes -> hop samples for training."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from megatron_rb.data.hop_file import write_hop_samples
from megatron_rb.value.answers import QUANTISATIONS
from megatron_rb.value.hops import CHUNK_RULES
from megatron_rb.value.label import LabelRules
from megatron_rb.value.sampling import ZERO_RULES, PairRules


def main(argv: list[str]) -> int:
    options = _parser().parse_args(argv)
    pairs = PairRules(options.pairs, options.zero_share, options.zero_rule)
    rules = LabelRules(
        options.chunk,
        options.chunk_rule,
        pairs,
        options.quantisation,
        options.permuted_share,
        options.view_dropout,
        options.context_dropout,
        options.reference_swap,
    )
    part = re.fullmatch(r"(\d+)/(\d+)", options.part)
    if part is None:
        raise ValueError(f"--part {options.part} is not K/N, e.g. 0/4 for the first of four")
    mine = int(part[1]), int(part[2])
    report = write_hop_samples(
        Path(options.data), Path(options.out), rules, options.seed, part=mine, progress=sys.stderr.isatty()
    )
    refused = ", ".join(f"{count} {problem}" for problem, count in report.refused.items())
    print(f"{options.out}: {report.samples} samples of {report.episodes} episodes; refused: {refused or 'none'}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rb value label", description=__doc__)
    parser.add_argument("--data", required=True, help="jsonl of frames or of episode_dir, or folder of raw episodes")
    parser.add_argument("--out", required=True, metavar="SAMPLES.jsonl")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pairs", type=int, default=1000, help="at most, per episode")
    parser.add_argument("--chunk", type=int, default=20, help="frames per state")
    parser.add_argument("--chunk-rule", choices=CHUNK_RULES, default="paper")
    parser.add_argument("--zero-share", type=float, default=0.05)
    parser.add_argument("--zero-rule", choices=ZERO_RULES, default="paper")
    parser.add_argument("--quantisation", choices=QUANTISATIONS, default="percent")
    parser.add_argument("--permuted-share", type=float, default=0.287, help="pairs shown again in another camera order")
    parser.add_argument("--view-dropout", type=float, default=0.0)
    parser.add_argument("--context-dropout", type=float, default=0.0)
    parser.add_argument(
        "--reference-swap", type=float, default=0.0, help="share with another episode's references; released: 0.75"
    )
    parser.add_argument(
        "--part", default="0/1", metavar="K/N", help="every N-th episode from the K-th, for N processes"
    )
    return parser
