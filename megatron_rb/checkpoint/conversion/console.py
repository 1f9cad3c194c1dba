"""How conversions show themselves on a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TaskID, TextColumn, TimeElapsedColumn, TransferSpeedColumn
from rich.progress import Progress as Bars
from rich.table import Table

from megatron_rb.checkpoint.conversion.outcome import Summary
from megatron_rb.checkpoint.conversion.verify import FolderComparison

LISTED = 20
"""Differences shown before the rest is counted."""


class ByteBars:
    """A bar of bytes for every kind of work, told from any thread."""

    def __init__(self, bars: Bars) -> None:
        self.bars = bars
        self.tasks: dict[str, TaskID] = {}

    def total(self, doing: str, num_bytes: int) -> None:
        self.tasks[doing] = self.bars.add_task(doing, total=num_bytes)

    def advance(self, doing: str, num_bytes: int) -> None:
        self.bars.advance(self.tasks[doing], num_bytes)


@contextmanager
def byte_bars(console: Console) -> Iterator[ByteBars]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
    )
    with Bars(*columns, console=console) as bars:
        yield ByteBars(bars)


def show_summary(console: Console, summary: Summary) -> None:
    """A new folder, in one row, and what is to know about it."""
    table = Table("folder", "tensors", "parameters", "GB", "dtype", "files")
    table.add_row(
        str(summary.folder),
        f"{summary.num_tensors:,}",
        f"{summary.num_parameters:,}",
        f"{summary.num_bytes / 1e9:.3f}",
        ", ".join(summary.dtypes),
        str(summary.num_files),
    )
    console.print(table)
    for note in summary.notes:
        console.print(f"note: {note}", highlight=False, markup=False)


def show_description(console: Console, description: Mapping[str, Any]) -> None:
    """What a folder is, a line each."""
    table = Table("", "", show_header=False)
    for key, value in description.items():
        if isinstance(value, Mapping):
            value = "\n".join(
                f"{name}: {item:,}" if isinstance(item, int) else f"{name}: {item}" for name, item in value.items()
            )
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        table.add_row(key, _number(value))
    console.print(table)


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def show_comparison(console: Console, comparison: FolderComparison) -> None:
    """The verdict, and the differences."""
    if comparison.differences:
        table = Table("tensor or value", "differs in", "A", "B")
        for difference in comparison.differences[:LISTED]:
            table.add_row(difference.name, difference.what, difference.a, difference.b)
        console.print(table)
    verdict = "equal" if comparison.equal else f"{len(comparison.differences)} differences"
    nans = f", {comparison.nans} NaNs with their payloads" if comparison.nans else ""
    console.print(f"{verdict}: {comparison.compared:,} tensors, {comparison.num_bytes / 1e9:.3f} GB compared{nans}")
    if comparison.forward is not None:
        console.print(_forward_words(comparison))


def _forward_words(comparison: FolderComparison) -> str:
    found = f"largest difference of a logit: {comparison.forward:.3g} (limit {comparison.forward_limit:.3g})"
    if comparison.forward_equal:
        return found
    if comparison.equal:
        return f"{found}; the tensors are equal and the logits are not: config.json differs, or one is not understood"
    return f"{found}; the sides do not compute the same"
