"""The command line of `rb convert`."""

from __future__ import annotations

import argparse

from megatron_rb.platform import available_platforms


def options(argv: list[str], description: str | None) -> argparse.Namespace:
    """The parsed command line; `way` is the subcommand."""
    parser = argparse.ArgumentParser(prog="rb convert", description=description)
    ways = parser.add_subparsers(
        dest="way", required=True, metavar="import|export|merge|from-megatron|migrate|inspect|verify"
    )
    way = ways.add_parser("import", help="Hugging Face folder to training checkpoint")
    way.add_argument("--hf", required=True, metavar="DIR", help="Hugging Face folder")
    _allow_drop(way)
    _common(way)
    way = ways.add_parser("export", help="training checkpoint to Hugging Face folder")
    way.add_argument("--ckpt", required=True, metavar="DIR", help="a checkpoint, or a run folder: its newest one")
    way.add_argument("--hf", default="", metavar="DIR", help="config and tokenizer; default: kept with the run")
    way.add_argument("--adapters", action="store_true", help="adapters alone, as peft writes them; default: merged")
    way.add_argument("--adapter", default="", metavar="NAME", help="with --adapters: which of several")
    way.add_argument("--base", default="", metavar="DIR", help="base weights of adapters; default: those of the run")
    _shards(way)
    _common(way)
    way = ways.add_parser("merge", help="Hugging Face folder and adapters of peft to a Hugging Face folder")
    way.add_argument("--base", required=True, metavar="DIR", help="Hugging Face folder that the adapters belong to")
    way.add_argument(
        "--adapter", required=True, action="append", metavar="DIR", help="folder of peft; may be repeated: they add up"
    )
    _shards(way)
    _common(way)
    way = ways.add_parser("from-megatron", help="Megatron checkpoint (mp_rank_* or torch_dist) to training checkpoint")
    way.add_argument("--ckpt", required=True, metavar="DIR", help="its root, or the folder of one iteration")
    way.add_argument("--hf", default="", metavar="DIR", help="config and tokenizer; default: config.json beside it")
    way.add_argument("--no-optimizer", action="store_true", help="weights only")
    _allow_drop(way)
    _common(way)
    way = ways.add_parser("migrate", help="training checkpoint for a cluster of another kind")
    way.add_argument("--ckpt", required=True, metavar="DIR", help="a checkpoint, or a run folder: its newest one")
    way.add_argument("--to", required=True, choices=available_platforms())
    way.add_argument("--out", required=True, metavar="DIR", help="new folder")
    way = ways.add_parser("inspect", help="what a folder is")
    way.add_argument("folder", metavar="DIR")
    way.add_argument("--json", action="store_true")
    way = ways.add_parser("verify", help="compare two folders tensor by tensor")
    way.add_argument("a", metavar="A")
    way.add_argument("b", metavar="B")
    way.add_argument("--hf", default="", metavar="DIR", help="config of checkpoints that come without one")
    way.add_argument("--forward", action="store_true", help="compare logits of drawn samples too")
    way.add_argument("--json", action="store_true")
    return parser.parse_args(argv)


def _shards(way: argparse.ArgumentParser) -> None:
    way.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="default 5GB")


def _common(way: argparse.ArgumentParser) -> None:
    way.add_argument("--out", required=True, metavar="DIR", help="new folder")
    way.add_argument("--dtype", default="keep", metavar="TYPE", help="keep (default), bf16 or fp32")


def _allow_drop(way: argparse.ArgumentParser) -> None:
    words = "a tensor to leave out, or a pattern of names such as '*.name'; may be repeated"
    way.add_argument("--allow-drop", action="append", default=[], metavar="NAME", help=words)
