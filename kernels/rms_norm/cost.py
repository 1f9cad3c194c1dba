"""Bytes of the root-mean-square norm, for rooflines; it computes next to nothing."""

from __future__ import annotations


def forward_bytes(rows: int, size: int, itemsize: int) -> int:
    """Every value once in and once out."""
    return 2 * rows * size * itemsize


def backward_bytes(rows: int, size: int, itemsize: int) -> int:
    """The input and the gradient in, the gradient of the input out."""
    return 3 * rows * size * itemsize
