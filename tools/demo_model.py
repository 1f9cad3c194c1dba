"""`rb demo-model`: a tiny randomly initialised Hugging Face folder of the RoboBrain architecture."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_rb.checkpoint.hf.tiny import TinySize, conversation_texts, write_tiny_model
from megatron_rb.shapes.families import FAMILIES, NEWEST

MODELS = "; ".join(f"{family.name}: {family.models}" for family in FAMILIES.values())


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="rb demo-model", description=__doc__)
    parser.add_argument("--texts", type=Path, required=True, help="conversations (jsonl) the vocabulary is learnt from")
    parser.add_argument("--out", type=Path, required=True, help="new folder for the model")
    parser.add_argument(
        "--family",
        choices=FAMILIES,
        default=NEWEST,
        help=MODELS,
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-pixels", type=int, default=TinySize.max_pixels, help="largest image area")
    args = parser.parse_args(argv)
    try:
        size = TinySize(max_pixels=args.max_pixels)
        weights = write_tiny_model(
            conversation_texts(args.texts), args.out, family=args.family, size=size, seed=args.seed
        )
    except ValueError as error:
        print(f"rb demo-model: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: {args.family}, {weights:,} weights")
    return 0
