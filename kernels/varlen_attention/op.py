"""Attention over packed sequences, one interface to what is installed: flash-attn, torch's varlen, SDPA."""

from __future__ import annotations

import torch

from megatron_rb.kernels.dispatch import Call, check_dtype, choose
from megatron_rb.kernels.varlen_attention import torch_impl
from megatron_rb.kernels.varlen_attention.segments import Segments


def varlen_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, causal: bool, implementation: str = "auto"
) -> torch.Tensor:
    """Scaled dot-product attention that never crosses a segment border.

    Args:
        q: `[tokens, heads, head_dim]`; k, v: `[tokens, groups, head_dim]`, heads a multiple of groups.
        segments: cover all tokens; empty ones are allowed.
        causal: a token sees itself and earlier tokens of its segment only.
        implementation: see `dispatch.TABLE`.

    Returns:
        `[tokens, heads, head_dim]`

    Raises:
        ValueError: an argument does not fit, or the implementation cannot run here.
    """
    _check(q, k, v, segments)
    name = choose("varlen_attention", q.device, Call(q.dtype, q.shape[2]), implementation)
    return _RUN[name](q, k, v, segments, causal)


def _flash_attn(q, k, v, segments: Segments, causal: bool) -> torch.Tensor:
    from flash_attn import flash_attn_varlen_func  # optional

    borders, longest = segments.cu_seqlens, segments.max_length
    return flash_attn_varlen_func(q, k, v, borders, borders, longest, longest, causal=causal)


def _flash_attn_3(q, k, v, segments: Segments, causal: bool) -> torch.Tensor:
    from flash_attn_interface import flash_attn_varlen_func  # optional

    borders, longest = segments.cu_seqlens, segments.max_length
    out = flash_attn_varlen_func(q, k, v, borders, borders, longest, longest, causal=causal)
    return out[0] if isinstance(out, tuple) else out  # early releases return the log-sum-exp too


def _torch_varlen(q, k, v, segments: Segments, causal: bool) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn  # torch 2.10 or newer

    borders, longest = segments.cu_seqlens, segments.max_length
    window = (-1, 0) if causal else (-1, -1)
    grouped = q.shape[1] != k.shape[1]
    return varlen_attn(q, k, v, borders, borders, longest, longest, window_size=window, enable_gqa=grouped)  # type: ignore


_RUN = {
    "flash_attn_3": _flash_attn_3,
    "flash_attn": _flash_attn,
    "torch_varlen": _torch_varlen,
    "torch": torch_impl.varlen_attention,
}


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments) -> None:
    check_dtype("q", q)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 3 or x.shape[0] != q.shape[0] or x.shape[2] != q.shape[2] or x.dtype != q.dtype:
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
