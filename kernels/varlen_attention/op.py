"""Attention over packed sequences, one interface to what is installed: flash-attn, torch's varlen, SDPA."""

from __future__ import annotations

import torch

from megatron_rb.kernels.dispatch import Call, check_dtype, choose
from megatron_rb.kernels.varlen_attention import torch_impl
from megatron_rb.kernels.varlen_attention.segments import Segments


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    segments: Segments,
    causal: bool,
    implementation: str = "auto",
    keys: Segments | None = None,
) -> torch.Tensor:
    """Scaled dot-product attention that never crosses a segment border.

    Args:
        q: `[tokens, heads, head_dim]`; k, v: `[keys, groups, head_dim]`, heads a multiple of groups.
        segments: cover all tokens; empty ones are allowed.
        causal: a token sees itself and earlier tokens of its segment only.
        implementation: see `dispatch.TABLE`.
        keys: for every segment of q one of k and v, where they are not the same: the tokens are the last ones of a
            sequence, and the keys begin earlier. With `causal` the last token of a segment sees all its keys.

    Returns:
        `[tokens, heads, head_dim]`

    Raises:
        ValueError: an argument does not fit, or the implementation cannot run here.
    """
    _check(q, k, v, segments, causal, keys)
    name = choose("varlen_attention", q.device, Call(q.dtype, q.shape[2]), implementation)
    return _RUN[name](q, k, v, segments, causal, keys)


def _borders(segments: Segments, keys: Segments | None) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """Borders and longest segment of queries and keys, as the libraries take them; all align a causal mask at the end
    of both (flash-attn since release 2.1)."""
    seen = segments if keys is None else keys
    return segments.cu_seqlens, seen.cu_seqlens, segments.max_length, seen.max_length


def _flash_attn(q, k, v, segments: Segments, causal: bool, keys: Segments | None) -> torch.Tensor:
    from flash_attn import flash_attn_varlen_func  # optional

    return flash_attn_varlen_func(q, k, v, *_borders(segments, keys), causal=causal)


def _flash_attn_3(q, k, v, segments: Segments, causal: bool, keys: Segments | None) -> torch.Tensor:
    from flash_attn_interface import flash_attn_varlen_func  # optional

    out = flash_attn_varlen_func(q, k, v, *_borders(segments, keys), causal=causal)
    return out[0] if isinstance(out, tuple) else out  # early releases return the log-sum-exp too


def _flash_attn_4(q, k, v, segments: Segments, causal: bool, keys: Segments | None) -> torch.Tensor:
    from flash_attn.cute import flash_attn_varlen_func  # optional

    # By name: releases differ in what else stands between these.
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    borders = dict(zip(names, _borders(segments, keys), strict=True))
    return flash_attn_varlen_func(q, k, v, **borders, causal=causal)[0]  # with the log-sum-exp


def _torch_varlen(q, k, v, segments: Segments, causal: bool, keys: Segments | None) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn  # torch 2.10 or newer

    window = (-1, 0) if causal else (-1, -1)
    grouped = q.shape[1] != k.shape[1]
    return varlen_attn(q, k, v, *_borders(segments, keys), window_size=window, enable_gqa=grouped)  # type: ignore


_RUN = {
    "flash_attn_3": _flash_attn_3,
    "flash_attn": _flash_attn,
    "flash_attn_4": _flash_attn_4,
    "torch_varlen": _torch_varlen,
    "torch": torch_impl.varlen_attention,
}


def _check(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, causal: bool, keys: Segments | None
) -> None:
    check_dtype("q", q)
    rows = q.shape[0] if keys is None else k.shape[0]
    for name, x, expected in (("q", q, q.shape[0]), ("k", k, rows), ("v", v, rows)):
        if x.dim() != 3 or x.shape[0] != expected or x.shape[2] != q.shape[2] or x.dtype != q.dtype:
            raise ValueError(
                f"{name} is {x.dtype} {tuple(x.shape)} beside q {q.dtype} {tuple(q.shape)}; all must be "
                f"[tokens, heads, head_dim] of one dtype, tokens and head_dim"
            )
    if k.shape != v.shape or not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q has {q.shape[1]} heads, k {k.shape[1]} and v {v.shape[1]}; k and v must have the same number, and it "
            f"must divide that of q"
        )
    segments.check_covers(q.shape[0], "segments")
    if keys is not None:
        _check_keys(segments, keys, rows, causal)


def _check_keys(segments: Segments, keys: Segments, rows: int, causal: bool) -> None:
    keys.check_covers(rows, "keys")
    if len(keys.borders) != len(segments.borders):
        raise ValueError(f"there are {len(keys.lengths)} segments of keys and {len(segments.lengths)} of queries")
    for number, (queries, seen) in enumerate(zip(segments.lengths, keys.lengths, strict=True)):
        if seen < (queries if causal else min(queries, 1)):
            raise ValueError(
                f"segment {number} has {queries} queries and {seen} keys; every query must see at least one key"
            )
