"""Attention over packed sequences with torch's SDPA alone: one call for every run of sequences of one length."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, pairwise

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from megatron_rb.kernels.varlen_attention.segments import Segments


def varlen_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, causal: bool, keys: Segments | None = None
) -> torch.Tensor:
    """As `reference.varlen_attention`."""
    runs = equal_runs(segments, keys)
    if len(runs) == 1:
        return _equal_segments(q, k, v, runs[0][1:], causal)
    rows, seen = ([count * lengths[part] for count, *lengths in runs] for part in (0, 1))
    parts = [
        _equal_segments(a, b, c, lengths, causal)
        for a, b, c, (_, *lengths) in zip(q.split(rows), k.split(seen), v.split(seen), runs, strict=True)
    ]
    return torch.cat(parts) if parts else torch.zeros_like(q)


def equal_runs(segments: Segments, keys: Segments | None = None) -> list[tuple[int, int, int]]:
    """Neighbouring segments of the same lengths, as (number of segments, queries, keys); empty ones are left out."""
    pairs = zip(segments.lengths, (keys or segments).lengths, strict=True)
    return [(len(list(members)), *pair) for pair, members in groupby(pair for pair in pairs if any(pair))]


def _equal_segments(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: Sequence[int], causal: bool
) -> torch.Tensor:
    """Attention of segments that all have `lengths` queries and keys."""
    queries, keys = lengths
    if not queries:
        return q
    query = q.view(-1, queries, *q.shape[1:]).transpose(1, 2)
    key, value = (x.view(-1, keys, *x.shape[1:]).transpose(1, 2) for x in (k, v))
    # torch's own causal flag lets the first query see the first key only.
    mask = causal_lower_right(queries, keys) if causal and keys > queries else None
    out = F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=causal and mask is None, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2).reshape(q.shape)
