"""`rb demo-data`: training and held-out conversations from simulated episodes."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from megatron_rb.spatial.builders import DEMO_TASKS, SampleMix, write_split


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="rb demo-data", description=__doc__)
    parser.add_argument("--episodes", type=Path, default=Path("examples/robosim"), help="holds train/ and heldout/")
    parser.add_argument("--out", type=Path, required=True, help="folder for train.jsonl and heldout.jsonl")
    parser.add_argument("--media-root", type=Path, help="folder image paths start from (default: --episodes)")
    parser.add_argument("--tasks", nargs="+", default=list(DEMO_TASKS), help="pointing, uvd, waypoints, hop")
    parser.add_argument("--views", nargs="+", default=["side"], help="side, front")
    parser.add_argument("--hops-per-episode", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    mix = SampleMix(tasks=args.tasks, views=args.views, hops_per_episode=args.hops_per_episode)
    media_root = args.media_root or args.episodes
    try:
        reports = {
            split: write_split(args.episodes / split, args.out / f"{split}.jsonl", media_root, mix, args.seed)
            for split in ("train", "heldout")
        }
    except ValueError as error:
        print(f"rb demo-data: {error}", file=sys.stderr)
        return 2
    for split, report in reports.items():
        counts = {"file": str(args.out / f"{split}.jsonl"), "rows": dict(report.rows), "skipped": dict(report.skipped)}
        print(json.dumps(counts))
    print(f"image paths start from data.media_root={media_root}")
    return 0
