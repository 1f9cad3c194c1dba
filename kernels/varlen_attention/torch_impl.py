"""Attention over packed sequences with torch's SDPA alone: one call for every run of sequences of one length."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
import torch.nn.functional as F

from megatron_rb.kernels.varlen_attention.segments import Segments

QUERY_BLOCK = 2048
"""Most queries under one mask."""


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
    if causal and keys > queries:
        out = _last_queries(query, key, value)
    else:
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=grouped)
    return out.transpose(1, 2).reshape(q.shape)


def _last_queries(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal attention of the last tokens of sequences, `[sequences, heads, tokens, head_dim]`.

    torch's own causal flag lets the first query see the first key only, so there is a mask, and queries come in blocks:
    the mask stays small, and no block reads keys that are later than all of it.
    """
    queries, before = query.shape[2], key.shape[2] - query.shape[2]
    parts = []
    for start in range(0, queries, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, queries)
        seen = before + stop
        mask = torch.ones(stop - start, seen, dtype=torch.bool, device=query.device).tril(before + start)
        parts.append(
            F.scaled_dot_product_attention(
                query[:, :, start:stop],
                key[:, :, :seen],
                value[:, :, :seen],
                mask,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        )
    return torch.cat(parts, dim=2)
