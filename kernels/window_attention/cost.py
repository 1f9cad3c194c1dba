"""Bytes and FLOPs of windowed attention, for rooflines."""

from __future__ import annotations

from collections.abc import Sequence


def forward_bytes(patches: int, heads: int, head_dim: int, itemsize: int) -> int:
    """qkv once in, the output once out, cos and sin in fp32."""
    return patches * (4 * heads * head_dim * itemsize + 2 * 4 * (head_dim // 2))


def backward_bytes(patches: int, heads: int, head_dim: int, itemsize: int) -> int:
    """qkv and the gradient of the output in, the gradient of qkv out."""
    return patches * (7 * heads * head_dim * itemsize + 2 * 4 * (head_dim // 2))


def forward_flops(lengths: Sequence[int], heads: int, head_dim: int) -> int:
    """Two matrix products per window and head."""
    return sum(4 * length * length * heads * head_dim for length in lengths)


def backward_flops(lengths: Sequence[int], heads: int, head_dim: int) -> int:
    """Five: the scores again, and the gradients of v, of the scores, of q and of k."""
    return sum(10 * length * length * heads * head_dim for length in lengths)
