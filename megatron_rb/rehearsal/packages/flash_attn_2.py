"""flash-attn 2 as a rehearsal stands in for it: the packed forward and backward pass.

Signature of `flash_attn/flash_attn_interface.py`, checks and allocations of `csrc/flash_attn/flash_api.cpp`
(`mha_varlen_fwd`, `mha_varlen_bwd`), both the same in v2.8.0 to v2.8.3 of github.com/Dao-AILab/flash-attention.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

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

BLOCK = 128
"""Most queries of a block: rows that every sequence has more in buffers of the backward pass."""


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    """Attention over packed sequences: q `[tokens, heads, head_dim]`, borders int32 `[sequences + 1]`.

    Raises:
        RuntimeError, TypeError: an argument is refused, in the words of the package.
        NotImplementedError: for what training does not use: pages of keys, probabilities.
    """
    if block_table is not None or return_attn_probs:
        raise NotImplementedError("a rehearsal stands in for flash-attn 2 without block_table and return_attn_probs")
    check_longest(max_seqlen_q, max_seqlen_k)
    window = (window_size[0], 0 if causal else window_size[1])
    borders = Borders(cu_seqlens_q, cu_seqlens_k, window)
    keeps = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    return FlashAttn2Varlen.apply(q, k, v, borders, deterministic, keeps)


class FlashAttn2Varlen(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        borders: Borders,
        deterministic: bool,
        keeps: bool,
    ) -> torch.Tensor:
        head_dim = q.shape[2]
        q, k, v = (contiguous(_padded(x)) for x in (q, k, v))
        _check(q, k, v, borders)
        out, lse = torch.empty_like(q), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
        rng_state = q.new_empty(2, dtype=torch.int64)
        if keeps:
            ctx.save_for_backward(q, k, v, out, lse, borders.queries, borders.keys, rng_state)
            ctx.borders, ctx.deterministic = borders, deterministic
        borders.count(q, FORWARD)
        return out[..., :head_dim]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, *_ = ctx.saved_tensors
        given, borders = grads[0], ctx.borders
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        grad = contiguous(_padded(given))
        check(grad.dtype == q.dtype, "query and dout must have the same dtype")
        check_shape(grad, "dout", tuple(out.shape), "(total_q, num_heads, head_size)")
        held = _backward_buffers(q, k, borders.sequences, ctx.deterministic)
        borders.count(q, BACKWARD)
        del held
        head_dim = given.shape[-1]
        return dq[..., :head_dim], dk[..., :head_dim], dv[..., :head_dim], None, None, None


def _padded(x: torch.Tensor) -> torch.Tensor:
    missing = -x.shape[-1] % 8
    return F.pad(x, [0, missing]) if missing else x


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, borders: Borders) -> None:
    major, _ = torch.cuda.get_device_capability()
    check(major >= 8, "FlashAttention only supports Ampere GPUs or newer.")
    check_operands(q, k, v, HALF, "FlashAttention only support fp16 and bf16 data type")
    for name, tensor in (("cu_seqlens_q", borders.queries), ("cu_seqlens_k", borders.keys)):
        check_borders(tensor, name, f"{name} must have dtype int32")
    check(borders.sequences > 0, "batch size must be positive")
    total, heads, head_dim = q.shape
    check(head_dim <= 256, "FlashAttention forward only supports head dimension at most 256")
    check_heads(q, k)
    for name, tensor in (("k", k), ("v", v)):
        check_shape(tensor, name, (k.shape[0], k.shape[1], head_dim), "(total_k, num_heads_k, head_size)")
    for name, tensor in (("cu_seqlens_q", borders.queries), ("cu_seqlens_k", borders.keys)):
        check_shape(tensor, name, (borders.sequences + 1,), "(batch_size + 1)")
    check_values(borders, total, k.shape[0])


def _backward_buffers(q: torch.Tensor, k: torch.Tensor, sequences: int, deterministic: bool) -> list[torch.Tensor]:
    """What lives while the backward kernel runs: row sums, dq in fp32, dk and dv of every head."""
    total, heads, head_dim = q.shape
    rows, rounded = total + BLOCK * sequences, round_up(head_dim, 32 if head_dim <= 128 else 64)
    held = [q.new_empty((heads, rows), dtype=torch.float32)]
    if deterministic:
        processors = torch.cuda.get_device_properties(q.device).multi_processor_count
        splits = -(-processors // (sequences * heads))
        held.append(q.new_zeros((splits, rows, heads, rounded), dtype=torch.float32))
    else:
        held.append(q.new_empty((rows, heads, rounded), dtype=torch.float32))
    if k.shape[1] != heads:
        held += [q.new_empty((k.shape[0], heads, head_dim)) for _ in range(2)]
    return held
