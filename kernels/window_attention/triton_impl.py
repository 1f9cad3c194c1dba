"""Triton kernels of windowed attention: one program holds one window of one head from load to store.

A window has at most 64 patches, so its scores fit into registers: no running softmax, no saved statistics, no saved
output. The backward pass computes the forward again from qkv and writes dqkv; every value is written by one program, so
it gives the same bits every time. A head of 80 is a tile of 64 and one of 16, not a padded one of 128. The rotation
takes `x[j] * cos + sign * x[partner(j)] * sin` with a second load for the partner, which keeps every load in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megatron_rb.kernels.triton_math import dot, narrow

WARPS = 4
TILE = 64
"""Columns of the first tile of a head; the second has 16."""
UNIT = 8
"""Strides are passed in this many values: then the compiler knows that 16-byte loads are aligned for any head size."""


@triton.jit
def _columns(BASE: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr):
    """Columns of a tile, those of their partners, those of their angles, and the sign of the partner's part."""
    column = BASE + tl.arange(0, WIDTH)
    low = column < HALF
    partner = tl.where(low, column + HALF, column - HALF)
    angle = tl.where(low, column, column - HALF)
    sign = tl.where(low, -1.0, 1.0)
    return column[None, :], partner[None, :], angle[None, :], sign[None, :]


@triton.jit
def _tile(base, rows, row_stride, column, live):
    return tl.load(base + rows * row_stride + column, live, other=0.0)


@triton.jit
def _angles(cos, sin, rows, BASE: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr, live):
    """cos, and sin with the sign of the partner's part, for the columns of a tile."""
    column, _, angle, sign = _columns(BASE, WIDTH, HALF)
    mask = live & (column < 2 * HALF)
    return tl.load(cos + rows * HALF + angle, mask, other=0.0), sign * tl.load(
        sin + rows * HALF + angle, mask, other=0.0
    )


@triton.jit
def _partners_of(x, FROM: tl.constexpr, WIDTH_FROM: tl.constexpr, TO: tl.constexpr, WIDTH: tl.constexpr, HALF):
    """The values of a tile `x` from column FROM on that are partners of the columns of another tile, else zeros."""
    _, partner, _, _ = _columns(TO, WIDTH, HALF)
    exchange = tl.where(FROM + tl.arange(0, WIDTH_FROM)[:, None] == partner, 1.0, 0.0)
    return dot(x, narrow(exchange, x.dtype))


@triton.jit
def _rotated(base, rows, row_stride, c, s, BASE: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr, live):
    """A tile of a rotated head, and the same tile with partners exchanged."""
    column, partner, _, _ = _columns(BASE, WIDTH, HALF)
    mask = live & (column < 2 * HALF)
    own = _tile(base, rows, row_stride, column, mask).to(tl.float32)
    if HALF % 8 == 0:
        other = _tile(base, rows, row_stride, partner, mask).to(tl.float32)
    else:
        # Second halves begin where no 16-byte load can, so a product with zeros and ones brings the partners.
        column = tl.arange(0, 64)[None, :]
        x = _tile(base, rows, row_stride, column, live & (column < 2 * HALF))
        other = _partners_of(x, 0, 64, BASE, WIDTH, HALF)
        if 2 * HALF > 64 and BASE == 0:
            column = 64 + tl.arange(0, 16)[None, :]
            x = _tile(base, rows, row_stride, column, live & (column < 2 * HALF))
            other += _partners_of(x, 64, 16, BASE, WIDTH, HALF)
    return narrow(own * c + other * s, base.dtype.element_ty), narrow(other * c - own * s, base.dtype.element_ty)


@triton.jit
def _probabilities(scores, count, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)[None, :]
    scores = tl.where(column < count, scores, -float("inf"))
    weights = tl.exp(scores - tl.max(scores, 1)[:, None])
    return weights / tl.sum(weights, 1)[:, None]


@triton.jit
def _forward_kernel(
    qkv,
    out,
    cos,
    sin,
    borders,
    row_stride,
    part_stride,
    head_stride,
    scale,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    REST: tl.constexpr,
    UNIT: tl.constexpr,
):
    head, window = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start = tl.load(borders + window).to(tl.int64)
    count = (tl.load(borders + window + 1).to(tl.int64) - start).to(tl.int32)
    row_stride, part_stride, head_stride = row_stride * UNIT, part_stride * UNIT, head_stride * UNIT
    if count > 0:
        HALF: tl.constexpr = HEAD_DIM // 2
        rows = start + tl.arange(0, BLOCK)[:, None]
        live = tl.arange(0, BLOCK)[:, None] < count
        q = qkv + head * head_stride
        k, v = q + part_stride, q + 2 * part_stride
        dtype: tl.constexpr = qkv.dtype.element_ty
        c, s = _angles(cos, sin, rows, 0, TILE, HALF, live)
        q0, _q0 = _rotated(q, rows, row_stride, c, s, 0, TILE, HALF, live)
        k0, _k0 = _rotated(k, rows, row_stride, c, s, 0, TILE, HALF, live)
        scores = dot(q0, tl.trans(k0))
        if REST:
            c, s = _angles(cos, sin, rows, TILE, REST, HALF, live)
            q1, _q1 = _rotated(q, rows, row_stride, c, s, TILE, REST, HALF, live)
            k1, _k1 = _rotated(k, rows, row_stride, c, s, TILE, REST, HALF, live)
            scores += dot(q1, tl.trans(k1))
        p = narrow(_probabilities(scores * scale, count, BLOCK), dtype)
        column = tl.arange(0, TILE)[None, :]
        target = out + rows * (HEADS * HEAD_DIM) + head * HEAD_DIM
        mask = live & (column < HEAD_DIM)
        tl.store(target + column, narrow(dot(p, _tile(v, rows, row_stride, column, mask)), dtype), mask)
        if REST:
            column = TILE + tl.arange(0, REST)[None, :]
            mask = live & (column < HEAD_DIM)
            tl.store(target + column, narrow(dot(p, _tile(v, rows, row_stride, column, mask)), dtype), mask)


@triton.jit
def _store_turned_back(
    base,
    rows,
    row_stride,
    d_scores,
    own,
    partner,
    c,
    s,
    BASE: tl.constexpr,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    live,
):
    """Gradient of a rotated tile, `d_scores @ own`, turned back; its partners come from a second product."""
    gradient = dot(d_scores, own) * c - dot(d_scores, partner) * s
    column = BASE + tl.arange(0, WIDTH)[None, :]
    tl.store(base + rows * row_stride + column, narrow(gradient, base.dtype.element_ty), live & (column < 2 * HALF))


@triton.jit
def _backward_kernel(
    qkv,
    grad,
    dqkv,
    cos,
    sin,
    borders,
    row_stride,
    part_stride,
    head_stride,
    scale,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    REST: tl.constexpr,
    UNIT: tl.constexpr,
):
    head, window = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start = tl.load(borders + window).to(tl.int64)
    count = (tl.load(borders + window + 1).to(tl.int64) - start).to(tl.int32)
    row_stride, part_stride, head_stride = row_stride * UNIT, part_stride * UNIT, head_stride * UNIT
    if count > 0:
        HALF: tl.constexpr = HEAD_DIM // 2
        rows = start + tl.arange(0, BLOCK)[:, None]
        live = tl.arange(0, BLOCK)[:, None] < count
        dtype: tl.constexpr = qkv.dtype.element_ty
        q = qkv + head * head_stride
        k, v = q + part_stride, q + 2 * part_stride
        dq = dqkv + head * head_stride
        dk, dv = dq + part_stride, dq + 2 * part_stride
        above = grad + rows * (HEADS * HEAD_DIM) + head * HEAD_DIM
        column = tl.arange(0, TILE)[None, :]
        mask = live & (column < HEAD_DIM)
        c0, s0 = _angles(cos, sin, rows, 0, TILE, HALF, live)
        q0, q0_partner = _rotated(q, rows, row_stride, c0, s0, 0, TILE, HALF, live)
        k0, k0_partner = _rotated(k, rows, row_stride, c0, s0, 0, TILE, HALF, live)
        scores = dot(q0, tl.trans(k0))
        if REST:
            c1, s1 = _angles(cos, sin, rows, TILE, REST, HALF, live)
            q1, q1_partner = _rotated(q, rows, row_stride, c1, s1, TILE, REST, HALF, live)
            k1, k1_partner = _rotated(k, rows, row_stride, c1, s1, TILE, REST, HALF, live)
            scores += dot(q1, tl.trans(k1))
        p = _probabilities(scores * scale, count, BLOCK)
        turned = tl.trans(narrow(p, dtype))
        do = tl.load(above + column, mask, other=0.0)
        tl.store(dv + rows * row_stride + column, narrow(dot(turned, do), dtype), mask)
        dp = dot(do, tl.trans(_tile(v, rows, row_stride, column, mask)))
        if REST:
            column1 = TILE + tl.arange(0, REST)[None, :]
            mask1 = live & (column1 < HEAD_DIM)
            do1 = tl.load(above + column1, mask1, other=0.0)
            tl.store(dv + rows * row_stride + column1, narrow(dot(turned, do1), dtype), mask1)
            dp += dot(do1, tl.trans(_tile(v, rows, row_stride, column1, mask1)))
        ds = narrow(p * (dp - tl.sum(p * dp, 1)[:, None]) * scale, dtype)
        ds_turned = tl.trans(ds)
        _store_turned_back(dq, rows, row_stride, ds, k0, k0_partner, c0, s0, 0, TILE, HALF, live)
        _store_turned_back(dk, rows, row_stride, ds_turned, q0, q0_partner, c0, s0, 0, TILE, HALF, live)
        if REST:
            _store_turned_back(dq, rows, row_stride, ds, k1, k1_partner, c1, s1, TILE, REST, HALF, live)
            _store_turned_back(dk, rows, row_stride, ds_turned, q1, q1_partner, c1, s1, TILE, REST, HALF, live)


def launch_sizes(head_dim: int, heads: int, max_length: int) -> dict[str, int]:
    """Compile-time sizes of both kernels."""
    block = min(64, max(16, triton.next_power_of_2(max_length)))
    rest = 16 if head_dim > TILE else 0
    return {"HEADS": heads, "HEAD_DIM": head_dim, "BLOCK": block, "TILE": TILE, "REST": rest, "UNIT": UNIT}


def _launch(kernel, qkv, tensors, cos, sin, borders, max_length: int) -> None:
    heads, head_dim = qkv.shape[2:]
    grid = (heads, borders.shape[0] - 1)
    if grid[1] > 0 and qkv.shape[0]:
        kernel[grid](
            qkv,
            *tensors,
            cos,
            sin,
            borders,
            *(stride // UNIT for stride in qkv.stride()[:3]),
            head_dim**-0.5,
            **launch_sizes(head_dim, heads, max_length),
            num_warps=WARPS,
        )


@torch.library.custom_op("megatron_rb::window_attention", mutates_args=())
def forward(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, borders: torch.Tensor, max_length: int
) -> torch.Tensor:
    """`[patches, heads, head_dim]`, contiguous."""
    out = torch.empty(qkv.shape[0], *qkv.shape[2:], dtype=qkv.dtype, device=qkv.device)
    _launch(_forward_kernel, qkv, (out,), cos, sin, borders, max_length)
    return out


@forward.register_fake
def _(qkv, cos, sin, borders, max_length):
    return qkv.new_empty(qkv.shape[0], *qkv.shape[2:])


@torch.library.custom_op("megatron_rb::window_attention_backward", mutates_args=())
def backward(
    qkv: torch.Tensor, grad: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, borders: torch.Tensor, max_length: int
) -> torch.Tensor:
    """Gradient of qkv, in the same memory order as qkv; `grad` is contiguous."""
    dqkv = torch.empty_strided(qkv.shape, qkv.stride(), dtype=qkv.dtype, device=qkv.device)
    _launch(_backward_kernel, qkv, (grad, dqkv), cos, sin, borders, max_length)
    return dqkv


@backward.register_fake
def _(qkv, grad, cos, sin, borders, max_length):
    return torch.empty_strided(qkv.shape, qkv.stride(), dtype=qkv.dtype, device=qkv.device)
