"""Bytes and FLOPs of the rotary embedding, for rooflines."""

from __future__ import annotations


def mrope_bytes(tokens: int, heads: int, groups: int, head_dim: int, itemsize: int) -> int:
    """Every value of q and k once in and once out, cos and sin in fp32; forward and backward are alike."""
    return tokens * (2 * (heads + groups) * head_dim * itemsize + 2 * 4 * (head_dim // 2))


def mrope_flops(tokens: int, heads: int, groups: int, head_dim: int) -> int:
    """Two multiplications and one addition for each value."""
    return 3 * tokens * (heads + groups) * head_dim
