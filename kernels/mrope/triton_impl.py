"""Triton kernels of the rotary embedding: one program turns all query and key heads of one token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megatron_rb.kernels.triton_math import narrow, rounded

WARPS = 4
WHOLE_WARPS = 8
"""Of the kernel that loads whole heads: as many threads as 16-byte pieces, so that all of them load."""
BACKWARD_WARPS = 8
"""Of the norm's backward pass, which holds four tiles and two sums."""
PROGRAMS = 512
"""Programs of the norm's backward pass; each sums its share of the weight's gradient, in a fixed order."""


@triton.jit
def _turn(first, second, cos, sin, dtype: tl.constexpr, DIRECTION: tl.constexpr, LIKE_HF: tl.constexpr):
    if LIKE_HF:
        cos, sin = rounded(cos, dtype), rounded(sin, dtype)
        out_first = rounded(first * cos, dtype) - DIRECTION * rounded(second * sin, dtype)
        out_second = rounded(second * cos, dtype) + DIRECTION * rounded(first * sin, dtype)
    else:
        out_first = first * cos - DIRECTION * (second * sin)
        out_second = second * cos + DIRECTION * (first * sin)
    return out_first, out_second


@triton.jit
def _tile(
    q,
    k,
    token,
    q_token,
    q_head,
    k_token,
    k_head,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """Addresses of the first halves of all heads of a token, those of the queries in front, and which there are.

    One tile for both tensors: a few key heads alone would be too few values for 16-byte loads by all threads.
    """
    head, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK_HALF)[None, :]
    of_q = q + token * q_token + head * q_head + column
    of_k = k + token * k_token + (head - Q_HEADS) * k_head + column
    return tl.where(head < Q_HEADS, of_q, of_k), (head < Q_HEADS + K_HEADS) & (column < HALF)


@triton.jit
def _halves(address, mask, HALF: tl.constexpr):
    """Both halves of all heads in fp32."""
    first = tl.load(address, mask, other=0.0).to(tl.float32)
    return first, tl.load(address + HALF, mask, other=0.0).to(tl.float32)


@triton.jit
def _weights(q_weight, k_weight, OFFSET: tl.constexpr, Q_HEADS, BLOCK: tl.constexpr, HALF, BLOCK_HALF: tl.constexpr):
    """The norm's weight of every head, for one half of the columns."""
    head, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK_HALF)[None, :]
    of_q = tl.load(q_weight + OFFSET + column, column < HALF, other=0.0).to(tl.float32)
    of_k = tl.load(k_weight + OFFSET + column, column < HALF, other=0.0).to(tl.float32)
    return tl.where(head < Q_HEADS, of_q, of_k)


@triton.jit
def _rotate_kernel(
    q,
    k,
    q_out,
    k_out,
    cos,
    sin,
    q_weight,
    k_weight,
    q_token,
    q_head,
    k_token,
    k_head,
    eps,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    DIRECTION: tl.constexpr,
    LIKE_HF: tl.constexpr,
    NORM: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_HALF)[None, :]
    c = tl.load(cos + token * HALF + column, column < HALF, other=0.0)
    s = tl.load(sin + token * HALF + column, column < HALF, other=0.0)
    source, mask = _tile(q, k, token, q_token, q_head, k_token, k_head, Q_HEADS, K_HEADS, BLOCK, HALF, BLOCK_HALF)
    first, second = _halves(source, mask, HALF)
    if NORM:
        squares = tl.sum(first * first, 1) + tl.sum(second * second, 1)
        scale = tl.rsqrt(squares / (2 * HALF) + eps)[:, None]
        first = first * scale * _weights(q_weight, k_weight, 0, Q_HEADS, BLOCK, HALF, BLOCK_HALF)
        second = second * scale * _weights(q_weight, k_weight, HALF, Q_HEADS, BLOCK, HALF, BLOCK_HALF)
    dtype: tl.constexpr = q_out.dtype.element_ty
    first, second = _turn(first, second, c, s, dtype, DIRECTION, LIKE_HF)
    target, mask = _tile(
        q_out,
        k_out,
        token,
        Q_HEADS * 2 * HALF,
        2 * HALF,
        K_HEADS * 2 * HALF,
        2 * HALF,
        Q_HEADS,
        K_HEADS,
        BLOCK,
        HALF,
        BLOCK_HALF,
    )
    tl.store(target, narrow(first, dtype), mask)
    tl.store(target + HALF, narrow(second, dtype), mask)


@triton.jit
def _rotate_whole_kernel(
    q,
    k,
    q_out,
    k_out,
    cos,
    sin,
    q_token,
    q_head,
    k_token,
    k_head,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    DIRECTION: tl.constexpr,
    LIKE_HF: tl.constexpr,
):
    """For heads whose second half begins where no 16-byte load can: whole heads are loaded, partners exchanged."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_DIM)[None, :]
    low, live = column < HALF, column < 2 * HALF
    angle = token * HALF + tl.where(low, column, column - HALF)
    c, s = tl.load(cos + angle, live, other=0.0), tl.load(sin + angle, live, other=0.0)
    dtype: tl.constexpr = q_out.dtype.element_ty
    if LIKE_HF:
        c, s = rounded(c, dtype), rounded(s, dtype)
    source, mask = _tile(q, k, token, q_token, q_head, k_token, k_head, Q_HEADS, K_HEADS, BLOCK, 2 * HALF, BLOCK_DIM)
    own = tl.load(source, mask, other=0.0).to(tl.float32)
    partner = tl.where(low, column + HALF, tl.where(live, column - HALF, column))
    other = tl.gather(own, tl.broadcast_to(partner, (BLOCK, BLOCK_DIM)), 1)
    own, other = own * c, other * s
    if LIKE_HF:
        own, other = rounded(own, dtype), rounded(other, dtype)
    own += tl.where(low, -DIRECTION, DIRECTION) * other
    target, mask = _tile(
        q_out,
        k_out,
        token,
        Q_HEADS * 2 * HALF,
        2 * HALF,
        K_HEADS * 2 * HALF,
        2 * HALF,
        Q_HEADS,
        K_HEADS,
        BLOCK,
        2 * HALF,
        BLOCK_DIM,
    )
    tl.store(target, narrow(own, dtype), mask)


@triton.jit
def _norm_backward_kernel(
    q,
    k,
    q_grad,
    k_grad,
    dq,
    dk,
    partial,
    cos,
    sin,
    q_weight,
    k_weight,
    q_token,
    q_head,
    k_token,
    k_head,
    q_grad_token,
    q_grad_head,
    k_grad_token,
    k_grad_head,
    tokens,
    eps,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK_HALF)
    is_q = tl.arange(0, BLOCK)[:, None] < Q_HEADS
    weight_first = tl.zeros([BLOCK, BLOCK_HALF], tl.float32)
    weight_second = tl.zeros([BLOCK, BLOCK_HALF], tl.float32)
    for number in range(program, tokens, tl.num_programs(0)):
        token = tl.cast(number, tl.int64)
        c = tl.load(cos + token * HALF + column, column < HALF, other=0.0)[None, :]
        s = tl.load(sin + token * HALF + column, column < HALF, other=0.0)[None, :]
        source, mask = _tile(q, k, token, q_token, q_head, k_token, k_head, Q_HEADS, K_HEADS, BLOCK, HALF, BLOCK_HALF)
        first, second = _halves(source, mask, HALF)
        scale = tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / (2 * HALF) + eps)[:, None]
        first, second = first * scale, second * scale
        above, mask = _tile(
            q_grad,
            k_grad,
            token,
            q_grad_token,
            q_grad_head,
            k_grad_token,
            k_grad_head,
            Q_HEADS,
            K_HEADS,
            BLOCK,
            HALF,
            BLOCK_HALF,
        )
        g_first, g_second = _halves(above, mask, HALF)
        g_first, g_second = _turn(g_first, g_second, c, s, tl.float32, -1, False)
        weight_first += g_first * first
        weight_second += g_second * second
        g_first *= _weights(q_weight, k_weight, 0, Q_HEADS, BLOCK, HALF, BLOCK_HALF)
        g_second *= _weights(q_weight, k_weight, HALF, Q_HEADS, BLOCK, HALF, BLOCK_HALF)
        along = ((tl.sum(g_first * first, 1) + tl.sum(g_second * second, 1)) / (2 * HALF))[:, None]
        target, mask = _tile(
            dq,
            dk,
            token,
            Q_HEADS * 2 * HALF,
            2 * HALF,
            K_HEADS * 2 * HALF,
            2 * HALF,
            Q_HEADS,
            K_HEADS,
            BLOCK,
            HALF,
            BLOCK_HALF,
        )
        dtype: tl.constexpr = dq.dtype.element_ty
        tl.store(target, narrow(scale * (g_first - first * along), dtype), mask)
        tl.store(target + HALF, narrow(scale * (g_second - second * along), dtype), mask)
    row = partial + program.to(tl.int64) * (4 * HALF) + column
    tl.store(row, tl.sum(tl.where(is_q, weight_first, 0.0), 0), column < HALF)
    tl.store(row + HALF, tl.sum(tl.where(is_q, weight_second, 0.0), 0), column < HALF)
    tl.store(row + 2 * HALF, tl.sum(tl.where(is_q, 0.0, weight_first), 0), column < HALF)
    tl.store(row + 3 * HALF, tl.sum(tl.where(is_q, 0.0, weight_second), 0), column < HALF)


def _sizes(q: torch.Tensor, k: torch.Tensor) -> dict[str, int]:
    half = q.shape[2] // 2
    return {
        "Q_HEADS": q.shape[1],
        "K_HEADS": k.shape[1],
        "BLOCK": triton.next_power_of_2(q.shape[1] + k.shape[1]),
        "HALF": half,
        "BLOCK_HALF": triton.next_power_of_2(half),
    }


def whole_sizes(q_heads: int, k_heads: int, half: int) -> dict[str, int]:
    """Compile-time sizes of the kernel that loads whole heads."""
    block, block_dim = triton.next_power_of_2(q_heads + k_heads), triton.next_power_of_2(2 * half)
    return {"Q_HEADS": q_heads, "K_HEADS": k_heads, "BLOCK": block, "HALF": half, "BLOCK_DIM": block_dim}


def _strides(*tensors: torch.Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:2]]


def _rotate(q, k, cos, sin, weights, eps: float, forward: bool, like_hf: bool):
    q_out, k_out = (
        torch.empty(q.shape, dtype=q.dtype, device=q.device),
        torch.empty(k.shape, dtype=k.dtype, device=k.device),
    )
    half = q.shape[2] // 2
    if q.shape[0] and half % 8 and weights is None:
        _rotate_whole_kernel[(q.shape[0],)](
            q,
            k,
            q_out,
            k_out,
            cos,
            sin,
            *_strides(q, k),
            **whole_sizes(q.shape[1], k.shape[1], half),
            DIRECTION=1 if forward else -1,
            LIKE_HF=like_hf,
            num_warps=WHOLE_WARPS,
            enable_fp_fusion=not like_hf,
        )
    elif q.shape[0]:
        _rotate_kernel[(q.shape[0],)](
            q,
            k,
            q_out,
            k_out,
            cos,
            sin,
            *(weights or (cos, cos)),
            *_strides(q, k),
            eps,
            **_sizes(q, k),
            DIRECTION=1 if forward else -1,
            LIKE_HF=like_hf,
            NORM=weights is not None,
            num_warps=WARPS,
            enable_fp_fusion=not like_hf,
        )
    return q_out, k_out


@torch.library.custom_op("megatron_rb::mrope", mutates_args=())
def rotate(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, forward: bool, like_hf: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both tensors turned by the angles, or back; new and contiguous."""
    return _rotate(q, k, cos, sin, None, 0.0, forward, like_hf)


@rotate.register_fake
def _(q, k, cos, sin, forward, like_hf):
    return q.new_empty(q.shape), k.new_empty(k.shape)


@torch.library.custom_op("megatron_rb::qk_norm_mrope", mutates_args=())
def norm_rotate(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both tensors normalised head by head, then turned."""
    return _rotate(q, k, cos, sin, (q_weight, k_weight), eps, True, False)


@norm_rotate.register_fake
def _(q, k, q_weight, k_weight, cos, sin, eps):
    return q.new_empty(q.shape), k.new_empty(k.shape)


@torch.library.custom_op("megatron_rb::qk_norm_mrope_backward", mutates_args=())
def norm_rotate_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    q_grad: torch.Tensor,
    k_grad: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and, in fp32, of both weights."""
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    head_dim, programs = q.shape[2], max(1, min(PROGRAMS, q.shape[0]))
    partial = torch.empty(programs, 2, head_dim, dtype=torch.float32, device=q.device)
    _norm_backward_kernel[(programs,)](
        q,
        k,
        q_grad,
        k_grad,
        dq,
        dk,
        partial,
        cos,
        sin,
        q_weight,
        k_weight,
        *_strides(q, k, q_grad, k_grad),
        q.shape[0],
        eps,
        **_sizes(q, k),
        num_warps=BACKWARD_WARPS,
    )
    weights = partial.sum(0)
    return dq, dk, weights[0].clone(), weights[1].clone()


@norm_rotate_backward.register_fake
def _(q, k, q_weight, k_weight, cos, sin, eps, q_grad, k_grad):
    weight = q.new_empty(q.shape[2], dtype=torch.float32)
    return q.new_empty(q.shape), k.new_empty(k.shape), weight, weight.clone()
