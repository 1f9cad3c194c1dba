"""`rb demo-data`: training and held-out conversations from simulated episodes."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

from megatron_rb.builders.build import TASKS, write_split
from megatron_rb.builders.rows import DEMO_TASKS, SampleMix
from megatron_rb.spatial.points import ImageSize


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="rb demo-data", description=__doc__)
    parser.add_argument("--episodes", type=Path, default=Path("examples/robosim"), help="holds train/ and heldout/")
    parser.add_argument("--out", type=Path, required=True, help="folder for train.jsonl, heldout.jsonl and media/")
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=list(DEMO_TASKS),
        choices=sorted(TASKS),
        metavar="TASK",
        help=", ".join(sorted(TASKS)),
    )
    parser.add_argument("--answer-form", default="2.5", help="2.5: 0-1000 and metres; 2.0: pixels")
    parser.add_argument(
        "--answer-size",
        nargs=2,
        type=int,
        metavar=("WIDTH", "HEIGHT"),
        help="2.0: of a picture as the processor resizes it; default as it lies there",
    )
    parser.add_argument("--views", nargs="+", default=["side"], help="side, front")
    parser.add_argument("--windows", type=int, default=4, help="random cuts per object and frame; 0 = whole pictures")
    parser.add_argument("--window-side", type=int, default=128, help="pixels")
    parser.add_argument("--hops-per-episode", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    sizes = {"windows": args.windows, "window_side": args.window_side, "hops_per_episode": args.hops_per_episode}
    try:
        size = ImageSize(*args.answer_size) if args.answer_size else None
        mix = SampleMix(tasks=args.tasks, views=args.views, version=args.answer_form, answer_size=size, **sizes)
        mixes = {"train": mix, "heldout": replace(mix, windows=min(mix.windows, 1))}
        for split, mix_of_split in mixes.items():
            report = write_split(args.episodes / split, args.out, split, mix_of_split, args.seed)
            print(f"{args.out / split}.jsonl: {_counts(report.rows)}")
            for what, counts in (
                ("not built", report.skipped),
                ("not checked by depth", report.unchecked),
                ("refused episodes", report.refused),
            ):
                print(f"  {what}: {_counts(counts)}")
    except ValueError as error:
        print(f"rb demo-data: {error}", file=sys.stderr)
        return 2
    return 0


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"
