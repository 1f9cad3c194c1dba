"""Attention within the segments of a packed sequence, spelled out: the definition."""

from __future__ import annotations

import torch

from megatron_rb.kernels.varlen_attention.segments import Segments


def varlen_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, causal: bool
) -> torch.Tensor:
    """Scaled dot-product attention that never crosses a segment border.

    Args:
        q: `[tokens, heads, head_dim]`; k, v: `[tokens, groups, head_dim]`, heads a multiple of groups.
        causal: a token sees itself and earlier tokens of its segment only.

    Returns:
        `[tokens, heads, head_dim]`
    """
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    parts = []
    for start, stop in zip(segments.borders, segments.borders[1:], strict=False):
        scores = torch.einsum("qhd,khd->hqk", q[start:stop], k[start:stop]) / q.shape[2] ** 0.5
        if causal:
            later = torch.ones(stop - start, stop - start, dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(later, float("-inf"))
        parts.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[start:stop]))
    return torch.cat(parts) if parts else torch.zeros_like(q)
