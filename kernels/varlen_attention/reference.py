"""Attention within the segments of a packed sequence, in plain torch: the definition, and the path on CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F

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
    borders = segments.borders
    lengths = [stop - start for start, stop in zip(borders, borders[1:], strict=False)]
    if len(set(lengths)) == 1:
        return _equal_segments(q, k, v, lengths[0], causal)
    parts = [
        _equal_segments(a, b, c, a.shape[0], causal)
        for a, b, c in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
        if a.shape[0]
    ]
    return torch.cat(parts)


def _equal_segments(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, length: int, causal: bool) -> torch.Tensor:
    heads_first = [x.view(-1, length, *x.shape[1:]).transpose(1, 2) for x in (q, k, v)]
    query, key, value = heads_first
    out = F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2).reshape(q.shape)
