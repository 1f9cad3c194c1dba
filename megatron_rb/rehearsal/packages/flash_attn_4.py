"""flash-attn 4 as a rehearsal stands in for it: the packed forward and backward pass.

Signature, checks and allocations of `flash_attn/cute/interface.py` (`_flash_attn_fwd`, `_flash_attn_bwd`) in
fa4-v4.0.0.beta27 of github.com/Dao-AILab/flash-attention. It says no by assertions.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_rb.rehearsal.arithmetic import BACKWARD, FORWARD
from megatron_rb.rehearsal.packages.varlen import HALF, Borders, check_longest, check_values, round_up

__all__ = ["flash_attn_varlen_func"]

ALIGNED = 16
"""Bytes."""
EVERYTHING = (None, None)


def flash_attn_varlen_func(
    q,
    k,
    v,
    qv=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    min_seqlen_k=None,
    seqused_q=None,
    seqused_k=None,
    gather_kv_indices=None,
    page_table=None,
    softmax_scale=None,
    causal=False,
    window_size=EVERYTHING,
    learnable_sink=None,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    score_mod=None,
    score_mod_bwd=None,
    mask_mod=None,
    block_sparse_tensors=None,
    aux_tensors=None,
    aux_scalars=None,
    return_lse=False,
    scheduler_metadata=None,
    seqlen_k_per_split=None,
    disable_scheduler_metadata=False,
):
    """Attention over packed sequences and its log-sum-exp: q `[tokens, heads, head_dim]`, borders int32.

    Raises:
        AssertionError, RuntimeError, TypeError: an argument is refused.
        NotImplementedError: for what training with packed sequences does not use.
    """
    others = (qv, seqused_q, seqused_k, gather_kv_indices, page_table, learnable_sink, score_mod, score_mod_bwd)
    others = (*others, mask_mod, block_sparse_tensors, aux_tensors, aux_scalars, scheduler_metadata)
    packed = cu_seqlens_q is not None and cu_seqlens_k is not None
    if not packed or num_splits != 1 or any(each is not None for each in others):
        raise NotImplementedError(
            "a rehearsal stands in for flash-attn 4 with cu_seqlens_q and cu_seqlens_k, without others or splits"
        )
    check_longest(max_seqlen_q, max_seqlen_k)
    left, right = (-1 if size is None else size for size in window_size)
    borders = Borders(cu_seqlens_q, cu_seqlens_k, (left, 0 if causal else right))
    keeps = any(x.requires_grad for x in (q, k, v)) or return_lse
    return FlashAttn4Varlen.apply(q, k, v, borders, keeps)


class FlashAttn4Varlen(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        borders: Borders,
        keeps: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        q, k, v = (_aligned(x) for x in (q, k, v))
        _check(q, k, v, borders)
        out = q.new_empty(q.shape)
        lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32) if keeps else None
        ctx.save_for_backward(q, k, v, out, lse, borders.queries, borders.keys)
        ctx.borders = borders
        ctx.set_materialize_grads(False)
        borders.count(q, FORWARD)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, *_ = ctx.saved_tensors
        borders = ctx.borders
        major, _ = torch.cuda.get_device_capability()
        assert major in (9, 10, 11, 12), "Unsupported compute capability. Supported: 9.x, 10.x, 11.x, 12.x"
        grad = _aligned(torch.zeros_like(out) if grads[0] is None else grads[0])
        assert grad.shape == out.shape, f"dout has {tuple(grad.shape)}, not {tuple(out.shape)}"
        assert grad.dtype == q.dtype, "inputs must have the same dtype"
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        held = _backward_buffers(q, k, borders)
        borders.count(q, BACKWARD)
        del held
        return dq, dk, dv, None, None


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """Strides of 16 bytes, and a contiguous last dimension."""
    fits = x.stride(-1) == 1 and all(stride * x.element_size() % ALIGNED == 0 for stride in x.stride()[:-1])
    return x if fits else x.contiguous()


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, borders: Borders) -> None:
    rows, groups, head_dim = v.shape
    count = borders.queries.shape[0]
    assert k.shape == (rows, groups, q.shape[-1]), f"k has {tuple(k.shape)} beside v {tuple(v.shape)}"
    assert borders.keys.shape == (count,), "cu_seqlens_k must have shape (batch_size + 1,)"
    assert borders.queries.shape == (count,), "cu_seqlens_q must have shape (batch_size + 1,)"
    assert v.dtype in HALF, "inputs must be float16, bfloat16, fp8 e4m3fn, or fp8 e5m2"
    assert q.dtype == k.dtype == v.dtype, "q, k, v, and qv must have the same dtype"
    for tensor in (borders.queries, borders.keys):
        assert tensor.dtype == torch.int32, "cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k must be int32"
        assert tensor.stride(0) == 1, "cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k must be contiguous"
    everything = (q, k, v, borders.queries, borders.keys)
    assert all(tensor.device.type == "cuda" for tensor in everything), "inputs must be on CUDA device"
    assert q.shape[-2] % groups == 0, "num_head must be divisible by num_head_kv"
    _check_head_dim(q.shape[-1], head_dim, ALIGNED // v.element_size())
    check_values(borders, q.shape[0], rows)


def _check_head_dim(head_dim: int, head_dim_v: int, alignment: int) -> None:
    major, minor = torch.cuda.get_device_capability()
    assert 8 <= major <= 12, "Unsupported compute capability. Supported: 8.x, 9.x, 10.x, 11.x, 12.x"
    if major in (8, 12):
        return
    most = 256 if major == 9 else 128
    fits = all(8 <= size <= most and size % alignment == 0 for size in (head_dim, head_dim_v))
    assert fits or (major in (10, 11) and head_dim == head_dim_v == 256), (
        f"(head_dim, head_dim_v)=({head_dim}, {head_dim_v}) is not supported on SM{major}{minor}. head_dim and "
        f"head_dim_v must be between 8 and {most} and divisible by {alignment}."
    )


def _backward_buffers(q: torch.Tensor, k: torch.Tensor, borders: Borders) -> list[torch.Tensor]:
    """What lives while the backward kernel runs, in fp32: dq, row sums, and dk and dv of groups of heads."""
    total, heads, head_dim = q.shape
    queries, keys = _blocks(head_dim, borders.window != (-1, -1))
    rounded, borders_count = round_up(head_dim, 32), borders.sequences + 1
    rows = (total + borders_count * queries - 1) // queries * queries
    held = [q.new_empty((heads, rows * rounded), dtype=torch.float32)]
    held += [q.new_empty((heads, rows), dtype=torch.float32) for _ in range(2)]
    if k.shape[1] != heads:
        key_rows = (k.shape[0] + borders_count * keys - 1) // keys * keys
        held += [q.new_zeros((k.shape[1], key_rows * rounded), dtype=torch.float32) for _ in range(2)]
    return held


def _blocks(head_dim: int, limited: bool) -> tuple[int, int]:
    """Queries and keys of a block of the backward kernel; two blocks share keys on Blackwell."""
    major, _ = torch.cuda.get_device_capability()
    if major == 12:
        return 64, 64
    if major != 9:
        return 128, 256 if head_dim >= 128 else 128
    if head_dim <= 64:
        return 128, 128
    if head_dim <= 128:
        return 80 if head_dim > 96 and not limited else 64, 128
    return (64, 96) if head_dim <= 192 else (64, 64)
