"""flash-attn 3 as a rehearsal stands in for it: the packed forward and backward pass.

Signature of `hopper/flash_attn_interface.py`, checks and allocations of `hopper/flash_api.cpp` (`mha_fwd`, `mha_bwd`)
in v2.8.3 of github.com/Dao-AILab/flash-attention, which calls itself 3.0.0b1.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_rb.rehearsal.arithmetic import BACKWARD, FORWARD
from megatron_rb.rehearsal.packages.varlen import (
    HALF,
    Borders,
    check,
    check_borders,
    check_heads,
    check_longest,
    check_operands,
    check_shape,
    check_values,
    contiguous,
    round_up,
)

__all__ = ["flash_attn_varlen_func"]

ROUNDED = (64, 96, 128, 192, 256)
"""Heads are padded to one of these inside the kernels."""
MOST_SPLIT = 992
"""Most sequences whose blocks are shared out on the device."""


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    seqused_q=None,
    seqused_k=None,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
):
    """Attention over packed sequences: q `[tokens, heads, head_dim]`, borders int32 `[sequences + 1]`.

    Raises:
        RuntimeError, TypeError: an argument is refused, in the words of the package.
        NotImplementedError: for what training in half precision does not use.
    """
    others = (seqused_q, seqused_k, qv, q_descale, k_descale, v_descale)
    if any(each is not None for each in others) or attention_chunk or num_splits != 1:
        raise NotImplementedError(
            "a rehearsal stands in for flash-attn 3 without seqused, qv, descales, chunks and splits"
        )
    check_longest(max_seqlen_q, max_seqlen_k)
    window = _window(window_size, causal, max_seqlen_q, max_seqlen_k)
    return FlashAttn3Varlen.apply(q, k, v, Borders(cu_seqlens_q, cu_seqlens_k, window))


def _window(asked: tuple[int, int], causal: bool, longest_q: int, longest_k: int) -> tuple[int, int]:
    """Windows as long as all keys are none."""
    left = -1 if asked[0] >= longest_k - 1 else asked[0]
    right = -1 if asked[1] >= longest_q - 1 else asked[1]
    return left, 0 if causal else right


class FlashAttn3Varlen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, borders: Borders) -> torch.Tensor:
        q, k = contiguous(q), contiguous(k)
        v = v.contiguous() if v.stride(-1) != 1 and v.stride(-3) != 1 else v
        _check(q, k, v, borders)
        out = q.new_empty(q.shape)
        lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
        shared_out = borders.sequences <= MOST_SPLIT
        held = q.new_empty(1 + borders.sequences * shared_out, dtype=torch.int32)
        ctx.save_for_backward(q, k, v, out, lse, borders.queries, borders.keys)
        ctx.borders = borders
        borders.count(q, FORWARD)
        del held
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, *_ = ctx.saved_tensors
        borders = ctx.borders
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        grad = contiguous(grads[0])
        check(grad.dtype == q.dtype, "query and dout must have the same dtype")
        check_shape(grad, "dout", tuple(out.shape), "(total_q, num_heads, head_size)")
        held = _backward_buffers(q, k, borders)
        borders.count(q, BACKWARD)
        del held
        return dq, dk, dv, None


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, borders: Borders) -> None:
    major, _ = torch.cuda.get_device_capability()
    check(major >= 8, "FlashAttention only supports Ampere GPUs or newer.")
    check_operands(q, k, v, HALF, "FlashAttention only supports fp16, bf16, and fp8_e4m3 data type")
    for name, tensor in (("cu_seqlens_q", borders.queries), ("cu_seqlens_k", borders.keys)):
        check_borders(tensor, name, f"{name} must have dtype torch.int32")
    check(borders.queries.shape[0] == borders.keys.shape[0], "batch_size must be equal to batch_size_k")
    head_dim = q.shape[-1]
    check(head_dim <= ROUNDED[-1], f"FlashAttention forward only supports head dimension at most {ROUNDED[-1]}")
    check_heads(q, k)
    for name, tensor in (("cu_seqlens_q", borders.queries), ("cu_seqlens_k", borders.keys)):
        check_shape(tensor, name, (borders.sequences + 1,), "(batch_size + 1)")
    for name, tensor in (("k", k), ("v", v)):
        check_shape(tensor, name, (k.shape[0], k.shape[-2], head_dim), "(total_k, num_heads_k, head_size)")
    check(head_dim % 8 == 0, "head_size should be a multiple of 8")
    check_values(borders, q.shape[0], k.shape[0])


def _backward_buffers(q: torch.Tensor, k: torch.Tensor, borders: Borders) -> list[torch.Tensor]:
    """What lives while the backward kernel runs, in fp32: row sums, dq, and dk and dv of groups of heads."""
    total, heads, head_dim = q.shape
    rounded = next(size for size in ROUNDED if head_dim <= size)
    rows = _rows(total, borders.sequences, _query_block(rounded, borders.window))
    held = [q.new_empty((heads, rows), dtype=torch.float32) for _ in range(2)]
    held.append(q.new_empty((heads, rows * rounded), dtype=torch.float32))
    if k.shape[1] != heads:
        keys = _rows(k.shape[0], borders.sequences, _key_block(rounded))
        held += [q.new_zeros((k.shape[1], keys, rounded), dtype=torch.float32) for _ in range(2)]
    return held


def _rows(total: int, sequences: int, block: int) -> int:
    return round_up(total + sequences * block, block)


def _query_block(rounded: int, window: tuple[int, int]) -> int:
    """Queries of a block of the backward kernel."""
    limited = window != (-1, -1)
    if torch.cuda.get_device_capability()[0] >= 9:
        return 128 if rounded <= 64 else 80 if 96 < rounded <= 128 and not limited else 64
    return 128 if rounded <= 64 else 64


def _key_block(rounded: int) -> int:
    """Keys of a block of the backward kernel."""
    if rounded <= 128:
        return 128
    if torch.cuda.get_device_capability()[0] >= 9:
        return 96 if rounded <= 192 else 80
    return 80 if rounded <= 192 else 64
