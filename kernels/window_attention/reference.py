"""Attention within windows with the rotation in front of it, in plain torch: the definition."""

from __future__ import annotations

import torch

from megatron_rb.kernels.mrope.reference import apply_rope
from megatron_rb.kernels.varlen_attention.segments import Segments


def window_attention(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, windows: Segments) -> torch.Tensor:
    """Rotate queries and keys, then bidirectional attention of every patch to the patches of its window.

    Args:
        qkv: `[patches, 3, heads, head_dim]`; cos, sin: `[patches, head_dim / 2]`.

    Returns:
        `[patches, heads, head_dim]`
    """
    q, k, v = qkv.unbind(1)
    q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
    out = torch.empty_like(q)
    for start, stop in zip(windows.borders, windows.borders[1:], strict=False):
        scores = torch.einsum("qhd,khd->hqk", q[start:stop], k[start:stop]) / q.shape[2] ** 0.5
        out[start:stop] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[start:stop])
    return out
