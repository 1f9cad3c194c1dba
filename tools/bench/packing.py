"""Pack a mix for many ranks: how full and how even micro-batches are, beside next-fit and first-fit."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from megatron_rb.data.mixes import MIXES, load_mix
from megatron_rb.shapes.published import CONFIGS, published_shape


def main(argv: list[str]) -> int:
    options = _parser().parse_args(argv)
    from megatron_rb.bench.train.packing_simulation import simulate

    results = {}
    print("largest / mean of the micro-batches of a step (patches also: worst step), and of the ranks")
    heads = ("fill", "least", "tokens", "patches", "worst", "ranks", "samples/s")
    print(f"{'mix':<12}{'packing':<22}" + "".join(f"{head:>10}" for head in heads), flush=True)
    for name in options.mix:
        rows = simulate(load_mix(name), published_shape(options.model), options.ranks, options.steps)
        results[name] = [asdict(row) for row in rows]
        for row in rows:
            even = row.balance
            ratios = (
                even.micro_batch_tokens,
                even.micro_batch_patches,
                even.worst_micro_batch_patches,
                even.rank_patches,
            )
            figures = f"{even.fill:>10.1%}{even.least_fill:>10.1%}" + "".join(f"{ratio:>10.3f}" for ratio in ratios)
            print(f"{name:<12}{row.name:<22}{figures}{row.samples_per_second:>10,.0f}", flush=True)
    if options.json:
        content = {"model": options.model, "ranks": options.ranks, "steps": options.steps, "mixes": results}
        Path(options.json).write_text(json.dumps(content, indent=2))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rb bench packing", description=__doc__)
    parser.add_argument(
        "--mix",
        nargs="+",
        default=["images_8k", "images_16k", "video_16k", "text_8k"],
        metavar="NAME",
        help=f"{', '.join(MIXES)}, or a yaml file",
    )
    parser.add_argument("--model", default="RoboBrain2.0-3B", choices=CONFIGS, help="whose patch size samples have")
    parser.add_argument("--ranks", type=int, default=64, metavar="N", help="data-parallel ranks")
    parser.add_argument("--steps", type=int, default=8, metavar="K")
    parser.add_argument("--json", default="", metavar="FILE", help="write every figure")
    return parser
