"""Rotary embedding of queries and keys: text (multimodal, chunked or interleaved) and 2-D vision, with QK-norm or not.

The angles come per token (`reference.mrope_angles`, `reference.vision_angles`), so packed sequences and the slices of
context parallelism need nothing more: a slice of the tokens takes the same slice of the angles.
"""

from __future__ import annotations

import torch

from megatron_rb.kernels.dispatch import Call, check_dtype, choose
from megatron_rb.kernels.mrope import reference

COMPUTE = ("fp32", "like_hf")


def apply_mrope(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    compute: str = "fp32",
    implementation: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn q and k by the angles of their tokens; cos and sin get no gradient.

    Args:
        q: `[tokens, heads, head_dim]`; k: `[tokens, groups, head_dim]`. Slices of a packed projection are fine, as
            long as the values of a head are contiguous.
        cos, sin: fp32 `[tokens, head_dim / 2]`.
        compute: `fp32`, rounded once at the end (also what transformers does in its vision tower); `like_hf` rounds
            every operation to the type of q, bit for bit what transformers' text layers compute.
        implementation: see `dispatch.TABLE`.

    Raises:
        ValueError: shapes, types or strides do not fit, or the implementation cannot run here.
    """
    _check(q, k, cos, sin, compute)
    name = choose("mrope", q.device, Call(q.dtype, q.shape[2]), implementation)
    if name == "triton":
        return _TritonRotation.apply(q, k, cos, sin, compute == "like_hf")
    if compute == "like_hf":
        return reference.apply_rope_like_hf(q, cos, sin), reference.apply_rope_like_hf(k, cos, sin)
    return apply_rope(q, cos, sin), apply_rope(k, cos, sin)


def qk_norm_mrope(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    *,
    compute: str = "fp32",
    implementation: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm over every head of q and of k, then `apply_mrope`, in one pass over memory.

    Args:
        q_weight, k_weight: `[head_dim]`.
        compute: `like_hf` always runs in torch; it is there to compare with transformers.

    Raises:
        ValueError: as `apply_mrope`.
    """
    _check(q, k, cos, sin, compute)
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if tuple(weight.shape) != (q.shape[2],):
            raise ValueError(f"{name} has shape {tuple(weight.shape)}; it must be [head_dim] = [{q.shape[2]}]")
    if compute == "like_hf":
        normed = (reference.rms_norm_like_hf(x, w, eps) for x, w in ((q, q_weight), (k, k_weight)))
        q, k = (reference.apply_rope_like_hf(x, cos, sin) for x in normed)
        return q, k
    chosen = choose("qk_norm_mrope", q.device, Call(q.dtype, q.shape[2]), implementation)
    if chosen == "triton":
        return _TritonNormRotation.apply(q, k, q_weight, k_weight, cos, sin, eps)
    return tuple(_torch_norm_rope(x, w, cos, sin, eps) for x, w in ((q, q_weight), (k, k_weight)))  # type: ignore


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """As `reference.apply_rope`, with about half the passes over memory; cos and sin get no gradient."""
    if torch.compiler.is_compiling():
        # The compiler fuses the passes itself, and does not take views as outputs.
        return reference.apply_rope(x, cos.detach(), sin.detach())
    return _Rotation.apply(x, cos, sin)


def _torch_norm_rope(x, weight, cos, sin, eps: float) -> torch.Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = torch.nn.functional.rms_norm(wide, weight.shape, weight.to(wide.dtype), eps)
    return apply_rope(normed, cos, sin).to(x.dtype)


class _Rotation(torch.autograd.Function):
    """The backward pass of a rotation is the rotation by the negative angle."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, direction=1.0)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, sin, direction=-1.0), None, None


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, direction: float) -> torch.Tensor:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    wide = torch.promote_types(x.dtype, torch.float32)
    first, second = x.to(wide).chunk(2, dim=-1)
    out = torch.empty(x.shape, dtype=wide, device=x.device)
    out_first, out_second = out.chunk(2, dim=-1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-direction)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin, value=direction)
    return out.to(x.dtype)


class _TritonRotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, like_hf: bool):
        from megatron_rb.kernels.mrope import triton_impl  # triton is optional

        ctx.save_for_backward(cos, sin)
        ctx.like_hf = like_hf
        return triton_impl.rotate(q, k, cos, sin, True, like_hf)

    @staticmethod
    def backward(ctx, q_grad, k_grad):
        from megatron_rb.kernels.mrope import triton_impl

        cos, sin = ctx.saved_tensors
        q_grad, k_grad = _rows_dense(q_grad), _rows_dense(k_grad)
        return *triton_impl.rotate(q_grad, k_grad, cos, sin, False, ctx.like_hf), None, None, None


class _TritonNormRotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, q_weight, k_weight, cos, sin, eps: float):
        from megatron_rb.kernels.mrope import triton_impl

        ctx.save_for_backward(q, k, q_weight, k_weight, cos, sin)
        ctx.eps = eps
        return triton_impl.norm_rotate(q, k, q_weight, k_weight, cos, sin, eps)

    @staticmethod
    def backward(ctx, q_grad, k_grad):
        from megatron_rb.kernels.mrope import triton_impl

        saved = ctx.saved_tensors
        grads = triton_impl.norm_rotate_backward(*saved, ctx.eps, _rows_dense(q_grad), _rows_dense(k_grad))
        dq, dk, dq_weight, dk_weight = grads
        return dq, dk, dq_weight.to(saved[2].dtype), dk_weight.to(saved[3].dtype), None, None, None


def _rows_dense(x: torch.Tensor) -> torch.Tensor:
    """A gradient may come in any layout; the kernels read rows of contiguous values."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _check(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, compute: str) -> None:
    if compute not in COMPUTE:
        raise ValueError(f"compute is '{compute}'; use {' or '.join(COMPUTE)}")
    check_dtype("q", q)
    for name, x in (("q", q), ("k", k)):
        if x.dim() != 3:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be [tokens, heads, head_dim]")
        if x.stride(2) != 1:
            raise ValueError(f"{name} has strides {x.stride()}; the values of a head must be contiguous")
    if q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2] or q.dtype != k.dtype:
        raise ValueError(
            f"q is {q.dtype} {tuple(q.shape)} and k is {k.dtype} {tuple(k.shape)}; "
            f"they must have the same dtype, tokens and head_dim"
        )
    if q.shape[2] % 2:
        raise ValueError(f"head_dim of q is {q.shape[2]}; it must be even")
    wanted = (q.shape[0], q.shape[2] // 2)
    for name, table in (("cos", cos), ("sin", sin)):
        if tuple(table.shape) != wanted or not table.is_contiguous():
            raise ValueError(
                f"{name} has shape {tuple(table.shape)}, contiguous: {table.is_contiguous()}; it must be a contiguous "
                f"[tokens, head_dim / 2] = {list(wanted)}"
            )
        if table.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name} is {table.dtype}; angles are fp32")
