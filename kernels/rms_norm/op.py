"""Root-mean-square norm: Liger-Kernel's operator on NVIDIA, torch elsewhere."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megatron_rb.kernels.dispatch import Call, check_dtype, choose


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, implementation: str = "auto") -> torch.Tensor:
    """Norm over the last dimension; statistics in fp32, `weight` applied in the type of x.

    Args:
        x: `[..., size]`; weight: `[size]`.
        implementation: see `dispatch.TABLE`.

    Raises:
        ValueError: an argument does not fit, or the implementation cannot run here.
    """
    if not x.dim() or tuple(weight.shape) != (x.shape[-1],):
        raise ValueError(f"weight has shape {tuple(weight.shape)}; x of {tuple(x.shape)} needs its last dimension")
    if weight.dtype != x.dtype:
        raise ValueError(f"weight is {weight.dtype} and x {x.dtype}; they must have one dtype")
    check_dtype("x", x)
    if choose("rms_norm", x.device, Call(x.dtype), implementation) == "liger":
        return _liger(x, weight, eps)
    if x.dtype in (torch.float32, torch.float64):
        return F.rms_norm(x, weight.shape, weight, eps)
    return weight * F.rms_norm(x.float(), weight.shape, None, eps).to(x.dtype)


def _liger(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    from liger_kernel.ops import LigerRMSNormFunction  # optional

    # "llama" is the rounding described above. Not in place: the gradient may be needed elsewhere, by the residual.
    return LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)
