"""Bytes of the gated activation, for rooflines; it computes next to nothing."""

from __future__ import annotations


def forward_bytes(rows: int, ffn_size: int, itemsize: int) -> int:
    """Gate and up in, their product out."""
    return 3 * rows * ffn_size * itemsize


def backward_bytes(rows: int, ffn_size: int, itemsize: int) -> int:
    """Gate, up and the gradient in, both gradients out."""
    return 5 * rows * ffn_size * itemsize
