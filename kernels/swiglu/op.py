"""The gated activation of the MLPs: Liger-Kernel's operator on NVIDIA, torch elsewhere."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megatron_rb.kernels.dispatch import Call, check_dtype, choose
from megatron_rb.kernels.swiglu import reference


def swiglu(x: torch.Tensor, implementation: str = "auto") -> torch.Tensor:
    """`silu(gate) * up` of the packed output of the first linear; only that is kept for the backward pass.

    Args:
        x: `[..., 2 * ffn size]`, gate first.
        implementation: see `dispatch.TABLE`.

    Returns:
        `[..., ffn size]`

    Raises:
        ValueError: the last dimension is odd, or the implementation cannot run here.
    """
    if not x.dim() or x.shape[-1] % 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; the last dimension holds gate and up, so it must be even")
    check_dtype("x", x)
    if choose("swiglu", x.device, Call(x.dtype), implementation) == "liger":
        from liger_kernel.ops import LigerFusedGateUpSiLUMulFunction  # optional

        # In two dimensions: its gradient comes back in two (release 0.8.5).
        out = LigerFusedGateUpSiLUMulFunction.apply(x.reshape(-1, x.shape[-1]))
        return out.view(*x.shape[:-1], x.shape[-1] // 2)
    if torch.compiler.is_compiling():
        # The compiler fuses the passes itself, and does not take views as outputs.
        return reference.swiglu(x)
    return _Swiglu.apply(x)


class _Swiglu(torch.autograd.Function):
    """Keeps the packed input instead of gate, up and silu(gate); writes its gradient in one piece."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        out = torch.empty_like(x)
        d_gate, d_up = out.chunk(2, dim=-1)
        torch.ops.aten.silu.out(gate, out=d_up)
        d_up.mul_(grad)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=d_gate)
        return out
