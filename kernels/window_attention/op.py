"""Windowed attention of the ViT with its 2-D rotation, from the packed projection to the packed output."""

from __future__ import annotations

import torch

from megatron_rb.kernels.dispatch import Call, check_dtype, choose
from megatron_rb.kernels.mrope.op import apply_rope
from megatron_rb.kernels.varlen_attention.segments import Segments
from megatron_rb.kernels.varlen_attention.torch_impl import varlen_attention


def window_attention(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, windows: Segments, implementation: str = "auto"
) -> torch.Tensor:
    """Rotate queries and keys, then bidirectional attention within windows.

    Args:
        qkv: `[patches, 3, heads, head_dim]` without gaps between patches: the output of the projection, ordered
            q, k, v (contiguous) or head by head (`view(patches, heads, 3, head_dim).transpose(1, 2)`).
        cos, sin: fp32 `[patches, head_dim / 2]`.
        windows: cover all patches; may be empty. The Triton kernel takes windows of up to 64 patches.
        implementation: see `dispatch.TABLE`.

    Returns:
        `[patches, heads, head_dim]`, contiguous.

    Raises:
        ValueError: an argument does not fit, or the implementation cannot run here.
    """
    _check(qkv, cos, sin, windows)
    if chosen_kernel(qkv, windows, implementation) == "triton":
        return _TritonWindows.apply(qkv, cos, sin, windows.cu_seqlens, windows.max_length)
    q, k, v = qkv.unbind(1)
    return varlen_attention(apply_rope(q, cos, sin), apply_rope(k, cos, sin), v, windows, causal=False)


def chosen_kernel(qkv: torch.Tensor, windows: Segments, implementation: str) -> str:
    """Name of the implementation that would run."""
    return choose("window_attention", qkv.device, Call(qkv.dtype, qkv.shape[3], windows.max_length), implementation)


class _TritonWindows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, cos, sin, borders, max_length: int):
        from megatron_rb.kernels.window_attention import triton_impl  # triton is optional

        ctx.save_for_backward(qkv, cos, sin, borders)
        ctx.max_length = max_length
        return triton_impl.forward(qkv, cos, sin, borders, max_length)

    @staticmethod
    def backward(ctx, grad):
        from megatron_rb.kernels.window_attention import triton_impl

        qkv, cos, sin, borders = ctx.saved_tensors
        dqkv = triton_impl.backward(qkv, grad.contiguous(), cos, sin, borders, ctx.max_length)
        return dqkv, None, None, None, None


def _check(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, windows: Segments) -> None:
    if qkv.dim() != 4 or qkv.shape[1] != 3:
        raise ValueError(f"qkv has shape {tuple(qkv.shape)}; it must be [patches, 3, heads, head_dim]")
    check_dtype("qkv", qkv)
    patches, _, heads, head_dim = qkv.shape
    dense = {(3 * heads * head_dim, heads * head_dim, head_dim, 1), (3 * heads * head_dim, head_dim, 3 * head_dim, 1)}
    if qkv.numel() and qkv.stride() not in dense:
        raise ValueError(f"qkv has strides {qkv.stride()}; it must be packed, its strides one of {sorted(dense)}")
    if head_dim % 2:
        raise ValueError(f"head_dim of qkv is {head_dim}; it must be even")
    for name, table in (("cos", cos), ("sin", sin)):
        if tuple(table.shape) != (patches, head_dim // 2) or not table.is_contiguous():
            raise ValueError(
                f"{name} has shape {tuple(table.shape)}; it must be a contiguous [patches, head_dim / 2] = "
                f"[{patches}, {head_dim // 2}]"
            )
    windows.check_covers(patches, "windows")
