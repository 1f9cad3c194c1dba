"""Attention over packed sequences with torch's SDPA alone: one call for every run of sequences of one length."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, pairwise

import torch
import torch.nn.functional as F

from megatron_rb.kernels.varlen_attention.segments import Segments


def varlen_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, causal: bool
) -> torch.Tensor:
    """As `reference.varlen_attention`."""
    runs = equal_runs(segments.borders)
    if len(runs) == 1:
        return _equal_segments(q, k, v, runs[0][1], causal)
    rows = [count * length for count, length in runs]
    parts = [
        _equal_segments(a, b, c, length, causal)
        for a, b, c, (_, length) in zip(q.split(rows), k.split(rows), v.split(rows), runs, strict=True)
    ]
    return torch.cat(parts) if parts else torch.zeros_like(q)


def equal_runs(borders: Sequence[int]) -> list[tuple[int, int]]:
    """Neighbouring segments of the same length, as (number of segments, length); empty segments are left out."""
    lengths = [stop - start for start, stop in pairwise(borders) if stop > start]
    return [(len(list(members)), length) for length, members in groupby(lengths)]


def _equal_segments(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, length: int, causal: bool) -> torch.Tensor:
    query, key, value = (x.view(-1, length, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2).reshape(q.shape)
