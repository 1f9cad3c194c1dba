"""Bytes and FLOPs of the fused projection and cross entropy, for rooflines."""

from __future__ import annotations


def flops(rows: int, hidden_size: int, vocabulary: int) -> int:
    """Forward and backward: three matrix products (the logits, both gradients)."""
    return 3 * 2 * rows * hidden_size * vocabulary


def materialised_bytes(rows: int, vocabulary: int, itemsize: int) -> int:
    """What the largest tensors of the plain way hold at once: logits, fp32 logits, their softmax and both gradients."""
    return rows * vocabulary * (2 * itemsize + 3 * 4)
