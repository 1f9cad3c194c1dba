"""Turn a Hugging Face folder into a training checkpoint (import), or a checkpoint into such a folder (export)."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TaskID, TimeElapsedColumn
from rich.table import Table

from megatron_rb.platform import get_platform
from megatron_rb.platform.mcore_shims import install_mcore_shims


def main(argv: list[str]) -> int:
    """Convert in this process on the CPU; 0 when the new folder is complete."""
    options = _parser().parse_args(argv)
    platform = get_platform("cpu")
    install_mcore_shims(platform)

    from megatron_rb.checkpoint.convert import export_checkpoint, import_folder

    console = Console()
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        tasks: dict[str, TaskID] = {}

        def report(doing: str, done: int, total: int) -> None:
            if doing not in tasks:
                tasks[doing] = progress.add_task(doing, total=total)
            progress.update(tasks[doing], completed=done)

        if options.direction == "import":
            summary = import_folder(options.hf, options.out, options.dtype, platform, report)
        else:
            summary = export_checkpoint(
                options.ckpt, options.out, options.hf, options.dtype, options.max_shard_size, platform, report
            )
    table = Table("folder", "tensors", "parameters", "GB", "dtype", "files")
    table.add_row(
        str(summary.folder), f"{summary.num_tensors:,}", f"{summary.num_parameters:,}",
        f"{summary.num_bytes / 1e9:.3f}", ", ".join(summary.dtypes), str(summary.num_files),
    )  # fmt: skip
    console.print(table)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rb convert", description=__doc__)
    ways = parser.add_subparsers(dest="direction", required=True, metavar="import|export")
    to_checkpoint = ways.add_parser("import", help="Hugging Face folder to training checkpoint")
    to_checkpoint.add_argument("--hf", required=True, metavar="DIR", help="Hugging Face folder")
    to_folder = ways.add_parser("export", help="training checkpoint to Hugging Face folder")
    to_folder.add_argument("--ckpt", required=True, metavar="DIR", help="a checkpoint, or a run folder: its newest one")
    to_folder.add_argument("--hf", default="", metavar="DIR", help="config and tokenizer; default: kept with the run")
    to_folder.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="default 5GB")
    for way in (to_checkpoint, to_folder):
        way.add_argument("--out", required=True, metavar="DIR", help="new folder")
        way.add_argument("--dtype", default="keep", metavar="TYPE", help="keep (default), bf16 or fp32")
    return parser
