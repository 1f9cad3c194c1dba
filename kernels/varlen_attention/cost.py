"""Bytes and FLOPs of attention over packed sequences, for rooflines."""

from __future__ import annotations

from collections.abc import Sequence


def forward_bytes(
    tokens: int, heads: int, groups: int, head_dim: int, itemsize: int, key_tokens: int | None = None
) -> int:
    """q, k and v once in, the output once out.

    Args:
        key_tokens: rows of k and v; None = those of q.
    """
    seen = tokens if key_tokens is None else key_tokens
    return 2 * (tokens * heads + seen * groups) * head_dim * itemsize


def forward_flops(
    lengths: Sequence[int], heads: int, head_dim: int, causal: bool, key_lengths: Sequence[int] | None = None
) -> int:
    """Two matrix products per sequence and head; a causal mask leaves half of the square at the end.

    Args:
        key_lengths: keys of each sequence, of which the queries are the last ones; None = as many.
    """
    pairs = zip(lengths, lengths if key_lengths is None else key_lengths, strict=True)
    areas = (2 * queries * keys - (queries * queries if causal else 0) for queries, keys in pairs)
    return sum(2 * area * heads * head_dim for area in areas)


def backward_flops(
    lengths: Sequence[int], heads: int, head_dim: int, causal: bool, key_lengths: Sequence[int] | None = None
) -> int:
    """Five matrix products where the forward pass has two."""
    return forward_flops(lengths, heads, head_dim, causal, key_lengths) * 5 // 2
