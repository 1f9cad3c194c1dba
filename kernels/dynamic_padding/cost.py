"""Bytes of the row movements, for rooflines; they compute next to nothing."""

from __future__ import annotations


def gather_bytes(rows: int, taken: int, width: int, itemsize: int) -> int:
    """Every output row written, every named row and the int32 index read."""
    return (rows + taken) * width * itemsize + 4 * rows


def add_bytes(rows: int, taken: int, width: int, itemsize: int) -> int:
    """Base and named rows in, output out."""
    return (2 * rows + taken) * width * itemsize + 4 * rows
