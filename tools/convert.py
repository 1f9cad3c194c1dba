"""Move checkpoints between formats and clusters, and prove that nothing was lost: import, export, migrate, verify."""

from __future__ import annotations

import json
import signal
import tempfile
from argparse import Namespace
from functools import partial
from pathlib import Path

from rich.console import Console

from megatron_rb.checkpoint.conversion.command_line import options
from megatron_rb.checkpoint.conversion.console import (
    ByteBars,
    byte_bars,
    show_comparison,
    show_description,
    show_summary,
)
from megatron_rb.checkpoint.conversion.describe import describe
from megatron_rb.checkpoint.conversion.export_adapters import export_adapter
from megatron_rb.checkpoint.conversion.export_hf import export_checkpoint
from megatron_rb.checkpoint.conversion.from_megatron import convert_megatron
from megatron_rb.checkpoint.conversion.import_hf import import_folder
from megatron_rb.checkpoint.conversion.merge import merge_adapters, merge_checkpoint
from megatron_rb.checkpoint.conversion.migrate import migrate_checkpoint
from megatron_rb.checkpoint.conversion.outcome import Summary
from megatron_rb.checkpoint.conversion.verify import FolderComparison, find_side, verify
from megatron_rb.checkpoint.manifest import find_checkpoint, holds_adapters, read_manifest
from megatron_rb.launch.workers import start_workers


def main(argv: list[str]) -> int:
    """Convert on the CPU, whatever devices there are; 0 when the new folder is complete.

    1 when two folders differ, in their tensors or in the logits that were asked for.
    """
    o = options(argv, __doc__)
    console = Console()
    if o.way == "inspect":
        description = describe(o.folder)
        print(json.dumps(description, indent=1)) if o.json else show_description(console, description)
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops as Ctrl-C does: what is finished is kept
    try:
        with byte_bars(console) as bars:
            result = _run(o, bars)
    except KeyboardInterrupt:
        console.print("stopped; run the same command again to go on: finished files are kept")
        return 130
    if isinstance(result, FolderComparison):
        return _verdict(o, result, console)
    show_summary(console, result)
    return 0


def _run(o: Namespace, bars: ByteBars) -> Summary | FolderComparison:
    if o.way == "verify":
        return verify(o.a, o.b, bars, o.hf)
    if o.way == "import":
        return import_folder(o.hf, o.out, o.dtype, o.allow_drop, bars)
    if o.way == "export":
        return _export(o, bars)
    if o.way == "merge":
        return merge_adapters(o.base, o.adapter, o.out, o.dtype, o.max_shard_size, bars)
    if o.way == "from-megatron":
        return convert_megatron(o.ckpt, o.out, o.hf, o.dtype, not o.no_optimizer, o.allow_drop, bars)
    return migrate_checkpoint(o.ckpt, o.out, o.to, bars)


def _export(o: Namespace, bars: ByteBars) -> Summary:
    if o.adapters:
        return export_adapter(o.ckpt, o.out, o.hf, o.dtype, o.adapter, bars)
    if holds_adapters(read_manifest(find_checkpoint(o.ckpt))):
        return merge_checkpoint(o.ckpt, o.out, o.hf, o.base, o.dtype, o.max_shard_size, bars)
    return export_checkpoint(o.ckpt, o.out, o.hf, o.dtype, o.max_shard_size, bars)


def _verdict(o: Namespace, comparison: FolderComparison, console: Console) -> int:
    if o.forward:
        _compare_logits(o, comparison)
    print(json.dumps(comparison.as_json(), indent=1)) if o.json else show_comparison(console, comparison)
    return 0 if comparison.equal and comparison.forward_equal else 1


def _compare_logits(o: Namespace, comparison: FolderComparison) -> None:
    """Needs torch.distributed and transformers; the rest does not."""
    from megatron_rb.parity.forward_difference import forward_difference, logit_limit
    from megatron_rb.tools.parity import TRACE

    sides, start = (find_side(o.a), find_side(o.b)), partial(start_workers, TRACE)
    with tempfile.TemporaryDirectory(prefix="forward-") as folder:
        comparison.forward, largest = forward_difference(sides, o.hf, Path(folder), start)
    comparison.forward_limit = logit_limit(comparison.rounded_to, largest)
