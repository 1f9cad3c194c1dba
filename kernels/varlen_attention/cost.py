"""Bytes and FLOPs of attention over packed sequences, for rooflines."""

from __future__ import annotations

from collections.abc import Sequence


def forward_bytes(tokens: int, heads: int, groups: int, head_dim: int, itemsize: int) -> int:
    """q, k and v once in, the output once out."""
    return tokens * 2 * (heads + groups) * head_dim * itemsize


def forward_flops(lengths: Sequence[int], heads: int, head_dim: int, causal: bool) -> int:
    """Two matrix products per sequence and head; a causal mask leaves half of them."""
    return sum(4 * length * length * heads * head_dim // (2 if causal else 1) for length in lengths)


def backward_flops(lengths: Sequence[int], heads: int, head_dim: int, causal: bool) -> int:
    """Five matrix products where the forward pass has two."""
    return forward_flops(lengths, heads, head_dim, causal) * 5 // 2
