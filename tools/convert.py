"""Move checkpoints between formats and clusters, and prove that nothing was lost: import, export, migrate, verify."""

from __future__ import annotations

import argparse
import json

from rich.console import Console

from megatron_rb.checkpoint.conversion.console import byte_bars, show_comparison, show_description, show_summary
from megatron_rb.checkpoint.conversion.describe import describe
from megatron_rb.checkpoint.conversion.export_hf import export_checkpoint
from megatron_rb.checkpoint.conversion.import_hf import import_folder
from megatron_rb.checkpoint.conversion.migrate import PLATFORMS, migrate_checkpoint
from megatron_rb.checkpoint.conversion.verify import verify


def main(argv: list[str]) -> int:
    """Convert on the CPU, whatever devices there are; 0 when the new folder is complete, 1 when two folders differ."""
    o = _parser().parse_args(argv)
    console = Console()
    if o.way == "inspect":
        description = describe(o.folder)
        print(json.dumps(description, indent=1)) if o.json else show_description(console, description)
        return 0
    with byte_bars(console) as bars:
        if o.way == "import":
            result = import_folder(o.hf, o.out, o.dtype, o.allow_drop, bars)
        elif o.way == "export":
            result = export_checkpoint(o.ckpt, o.out, o.hf, o.dtype, o.max_shard_size, bars)
        elif o.way == "migrate":
            result = migrate_checkpoint(o.ckpt, o.out, o.to, bars)
        else:
            comparison = verify(o.a, o.b, bars, o.hf)
    if o.way != "verify":
        show_summary(console, result)
        return 0
    print(json.dumps(comparison.as_json(), indent=1)) if o.json else show_comparison(console, comparison)
    return 0 if comparison.equal else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rb convert", description=__doc__)
    ways = parser.add_subparsers(dest="way", required=True, metavar="import|export|migrate|inspect|verify")
    way = ways.add_parser("import", help="Hugging Face folder to training checkpoint")
    way.add_argument("--hf", required=True, metavar="DIR", help="Hugging Face folder")
    way.add_argument("--allow-drop", action="append", default=[], metavar="NAME", help="a tensor to leave out")
    _common(way)
    way = ways.add_parser("export", help="training checkpoint to Hugging Face folder")
    way.add_argument("--ckpt", required=True, metavar="DIR", help="a checkpoint, or a run folder: its newest one")
    way.add_argument("--hf", default="", metavar="DIR", help="config and tokenizer; default: kept with the run")
    way.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="default 5GB")
    _common(way)
    way = ways.add_parser("migrate", help="training checkpoint for a cluster of another kind")
    way.add_argument("--ckpt", required=True, metavar="DIR", help="a checkpoint, or a run folder: its newest one")
    way.add_argument("--to", required=True, choices=PLATFORMS)
    way.add_argument("--out", required=True, metavar="DIR", help="new folder")
    way = ways.add_parser("inspect", help="what a folder is")
    way.add_argument("folder", metavar="DIR")
    way.add_argument("--json", action="store_true")
    way = ways.add_parser("verify", help="compare two folders tensor by tensor")
    way.add_argument("a", metavar="A")
    way.add_argument("b", metavar="B")
    way.add_argument("--hf", default="", metavar="DIR", help="config of checkpoints that come without one")
    way.add_argument("--json", action="store_true")
    return parser


def _common(way: argparse.ArgumentParser) -> None:
    way.add_argument("--out", required=True, metavar="DIR", help="new folder")
    way.add_argument("--dtype", default="keep", metavar="TYPE", help="keep (default), bf16 or fp32")
