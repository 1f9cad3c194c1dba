"""`transformer_engine.pytorch.optimizers` as a rehearsal stands in for it.

Signatures and allocations of `pytorch/optimizers/` and `pytorch/csrc/extensions/multi_tensor/` in v2.9 of
github.com/NVIDIA/TransformerEngine, with moments in fp32.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_rb.rehearsal.packages.te_base import refuse, refused, refused_class

__all__ = [
    "FusedAdam",
    "FusedSGD",
    "MultiTensorApply",
    "multi_tensor_adam",
    "multi_tensor_applier",
    "multi_tensor_l2norm",
    "multi_tensor_scale",
]

PARTIAL_SUMS = 320
"""Of the norm of a list, in fp32."""
TYPES = (torch.float16, torch.bfloat16, torch.float32)


class FusedAdam(torch.optim.Optimizer):
    """Adam whose kernels change parameters and moments where they are."""

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        amsgrad=False,
        *,
        bias_correction=True,
        adam_w_mode=True,
        capturable=False,
        master_weights=False,
        master_weight_dtype=torch.float32,
        exp_avg_dtype=torch.float32,
        exp_avg_sq_dtype=torch.float32,
        use_decoupled_grad=False,
        store_param_remainders=False,
        set_grad_none=None,
    ) -> None:
        if amsgrad:
            raise RuntimeError("FusedAdam does not support the AMSGrad variant.")
        small = exp_avg_dtype is not torch.float32 or exp_avg_sq_dtype is not torch.float32
        if capturable or master_weights or use_decoupled_grad or store_param_remainders or small:
            refuse("optimizers that are captured, keep weights of their own or moments in less than fp32")
        defaults = {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps}
        super().__init__(params, defaults | {"weight_decay": weight_decay})
        self.adam_w_mode = int(adam_w_mode)
        self._dummy_overflow_buf = torch.tensor([0], dtype=torch.int, device="cuda")

    def zero_grad(self, set_to_none: bool | None = None) -> None:  # type: ignore[override]
        super().zero_grad(set_to_none=set_to_none is not False)

    def initialize_state(self, param: torch.Tensor, store_param_remainders: bool) -> None:
        for name in ("exp_avg", "exp_avg_sq"):
            self.state[param][name] = torch.zeros_like(param, dtype=torch.float32)

    @torch.no_grad()
    def step(self, closure=None, grad_scaler=None):
        """Moments where there are none yet; the update allocates nothing.

        Raises:
            RuntimeError: a parameter has a type that the kernel does not take, or not that of its gradient.
        """
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for param in group["params"]:
                self._update(param)
        return loss

    def _update(self, param: torch.Tensor) -> None:
        if not self.state[param]:
            self.initialize_state(param, False)
        if param.grad is None:
            return
        if param.dtype not in TYPES:
            raise RuntimeError("FusedAdam only support model weights in fp16/bf16 and fp32")
        if param.grad.dtype is not param.dtype or param.grad.device != param.device:
            raise RuntimeError(
                f"FusedAdam: a gradient is {param.grad.dtype} on {param.grad.device} beside a parameter that is "
                f"{param.dtype} on {param.device}"
            )


FusedSGD = refused_class("FusedSGD")


class MultiTensorApply:
    """Calls a kernel on lists of tensors."""

    def __init__(self, chunk_size: int) -> None:
        self.chunk_size = chunk_size

    def __call__(self, op: Any, noop_flag_buffer: Any, tensor_lists: Any, *args: Any) -> Any:
        return op(self.chunk_size, noop_flag_buffer, tensor_lists, *args)


multi_tensor_applier = MultiTensorApply(2048 * 32)


def multi_tensor_l2norm(chunk_size, noop_flag, tensor_lists, per_tensor=None):
    """The norm of the first list, fp32 `[1]`, and those of its tensors where they are asked for."""
    first = tensor_lists[0]
    _check(noop_flag, tensor_lists)
    sums = first[0].new_zeros(PARTIAL_SUMS, dtype=torch.float32)
    norms = sums.new_empty(len(first) if per_tensor else 0)
    return sums.new_empty(1), norms


def multi_tensor_scale(chunk_size, noop_flag, tensor_lists, scale):
    """Scale the first list into the second; allocates nothing."""
    _check(noop_flag, tensor_lists)
    if not isinstance(scale, int | float):
        raise TypeError(f"multi_tensor_scale(): incompatible function arguments: scale is {type(scale).__name__}")


def _check(noop_flag: torch.Tensor, tensor_lists: Any) -> None:
    """Where tensors lie and how many there are.

    Raises:
        RuntimeError: a tensor is not on the device, or lists do not match.
    """
    for tensors in tensor_lists:
        if len(tensors) != len(tensor_lists[0]) or not tensors:
            raise RuntimeError("Size mismatch among tensor lists")
        for tensor, other in zip(tensors, tensor_lists[0], strict=True):
            if tensor.device.type != "cuda" or tensor.numel() != other.numel():
                raise RuntimeError(
                    f"a tensor is on {tensor.device} with {tensor.numel()} values beside {other.numel()}"
                )
    if noop_flag is not None and noop_flag.device.type != "cuda":
        raise RuntimeError("noop_flag is not on the device")


multi_tensor_adam = refused("multi_tensor_adam")
