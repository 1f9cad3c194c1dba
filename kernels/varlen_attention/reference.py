"""Attention within the segments of a packed sequence, spelled out: the definition."""

from __future__ import annotations

import torch

from megatron_rb.kernels.varlen_attention.segments import Segments


def varlen_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, causal: bool, keys: Segments | None = None
) -> torch.Tensor:
    """Scaled dot-product attention that never crosses a segment border.

    Args:
        q: `[tokens, heads, head_dim]`; k, v: `[keys, groups, head_dim]`, heads a multiple of groups.
        causal: the last token of a segment sees all its keys, the one before it all but the last, and so on.
        keys: for every segment of q one of k and v; None = they are the same.

    Returns:
        `[tokens, heads, head_dim]`
    """
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    parts = []
    for queries, seen in zip(segments.slices(), (keys or segments).slices(), strict=True):
        scores = torch.einsum("qhd,khd->hqk", q[queries], k[seen]) / q.shape[2] ** 0.5
        if causal:
            rows, columns = scores.shape[1:]
            later = torch.ones(rows, columns, dtype=torch.bool, device=q.device).triu(1 + columns - rows)
            scores = scores.masked_fill(later, float("-inf"))
        parts.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[seen]))
    return torch.cat(parts) if parts else torch.zeros_like(q)
