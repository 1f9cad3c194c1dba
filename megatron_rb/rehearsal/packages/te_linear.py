"""`transformer_engine.pytorch.Linear` as a rehearsal stands in for it.

Signature, messages, allocations and saved tensors of `transformer_engine/pytorch/module/linear.py` in v2.9 of
github.com/NVIDIA/TransformerEngine, in half precision.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from megatron_rb.rehearsal.packages.te_base import (
    TransformerEngineBaseModule,
    all_reduce,
    gather,
    reduce_scatter,
    refuse,
    world_size,
)

__all__ = ["Linear"]

FIRST_SPREAD = 0.023
"""Of the first values where no other are asked for."""


class Linear(TransformerEngineBaseModule):
    """A product with a weight of which this rank may have a part."""

    def __init__(
        self,
        in_features,
        out_features,
        sequence_parallel=False,
        fuse_wgrad_accumulation=False,
        tp_group=None,
        tp_size=1,
        get_rng_state_tracker=None,
        rng_tracker_name=None,
        init_method=None,
        bias=True,
        return_bias=False,
        params_dtype=None,
        parallel_mode=None,
        parameters_split=None,
        device="cuda",
        ub_overlap_ag=False,
        ub_overlap_rs=False,
        ub_overlap_rs_dgrad=False,
        ub_bulk_dgrad=False,
        ub_bulk_wgrad=False,
        ub_name=None,
        delay_wgrad_compute=False,
        symmetric_ar_type=None,
        save_original_input=False,
        name=None,
    ) -> None:
        super().__init__()
        overlaps = (ub_overlap_ag, ub_overlap_rs, ub_overlap_rs_dgrad, ub_bulk_dgrad, ub_bulk_wgrad)
        if any(overlaps) or symmetric_ar_type is not None or delay_wgrad_compute:
            refuse("overlapped or symmetric communication and delayed gradients of weights")
        if fuse_wgrad_accumulation or parameters_split is not None:
            refuse("gradients that are added up inside the product and split parameters")
        assert parallel_mode in ("row", "column", None), f"parallel_mode {parallel_mode} not supported"
        self.use_bias, self.return_bias, self.apply_bias = bias, return_bias, bias and not return_bias
        self.rng_tracker_name, self.save_original_input, self.name = rng_tracker_name, save_original_input, name
        self.tp_size = tp_size if tp_group is None else world_size(tp_group)
        if tp_group is not None or tp_size == 1:
            self.set_tensor_parallel_group(tp_group)
        self.parallel_mode = parallel_mode
        self.in_features = _part(in_features, self.tp_size if parallel_mode == "row" else 1)
        self.out_features = _part(out_features, self.tp_size if parallel_mode == "column" else 1)
        self.sequence_parallel = self.tp_size > 1 and sequence_parallel
        dtype = torch.get_default_dtype() if params_dtype is None else params_dtype
        self._make_parameters(device, dtype, init_method or _first_values, get_rng_state_tracker)
        # After the sum over ranks, so not inside the product.
        self.gemm_bias_unfused_add = parallel_mode == "row" and self.apply_bias

    def _make_parameters(self, device: Any, dtype: torch.dtype, init_method: Any, tracker: Any) -> None:
        weight = torch.empty(self.out_features, self.in_features, device=device, dtype=dtype)
        self.register_initialised("weight", weight, init_method, tracker)
        if self.use_bias:
            bias = torch.empty(self.out_features, device=device, dtype=dtype)
            self.register_initialised("bias", bias, torch.nn.init.zeros_, None)
        else:
            self.bias = torch.Tensor().to(dtype=dtype, device=device)
        self.reset_parameters(defer_init=device == "meta")

    def reset_parameters(self, defer_init=False) -> None:
        super().reset_parameters(defer_init=defer_init)
        if defer_init:
            return
        _mark(self.weight, 1 if self.parallel_mode == "row" else 0)
        if self.use_bias and self.parallel_mode == "row":
            self.bias.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]
        elif self.use_bias and self.parallel_mode == "column":
            _mark(self.bias, 0)

    def forward(self, inp, is_first_microbatch=None, fp8_output=False, fp8_grad=False):
        """The product, and the bias beside it where that was asked for."""
        if fp8_output or fp8_grad:
            refuse("FP8")
        inp = self.prepare(inp)
        assert inp.shape[-1] == self.weight.shape[1], "GEMM not possible"
        way = _AcrossRanks(self.tp_group, self.parallel_mode if self.tp_size > 1 else None, self.sequence_parallel)
        bias = self.bias if self.apply_bias and not self.gemm_bias_unfused_add else None
        out = _Linear.apply(self.weight, inp, bias, way, self.activation_dtype)
        if self.gemm_bias_unfused_add:
            out = out + self.bias.to(self.activation_dtype)
        return (out, self.bias.to(self.activation_dtype)) if self.return_bias else out


@dataclass(frozen=True)
class _AcrossRanks:
    """What ranks say to each other around the product."""

    group: Any
    mode: str | None
    """`column`, `row`, or None = nothing."""
    sequence_parallel: bool


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: torch.Tensor,
        inp: torch.Tensor,
        bias: torch.Tensor | None,
        way: _AcrossRanks,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        held = inp.to(dtype)
        total = gather(held, way.group)[0] if way.mode == "column" and way.sequence_parallel else held
        out = F.linear(total, weight.to(dtype), None if bias is None else bias.to(dtype))
        if way.mode == "row":
            out = (reduce_scatter if way.sequence_parallel else all_reduce)(out, way.group)[0]
        ctx.save_for_backward(held if weight.requires_grad else None, weight)
        ctx.way, ctx.shape, ctx.biased = way, inp.shape, bias is not None
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        held, weight = ctx.saved_tensors
        way: _AcrossRanks = ctx.way
        grad = grads[0].reshape(-1, grads[0].shape[-1]).contiguous()
        if way.mode == "row" and way.sequence_parallel:
            grad = gather(grad, way.group)[0]
        total, gathered = held, None
        if held is not None and way.mode == "column" and way.sequence_parallel:
            total, gathered = gather(held, way.group, async_op=True)
        dgrad, summed = _grad_of_input(ctx, grad, weight)
        wgrad = bgrad = None
        if total is not None:
            if gathered is not None:
                gathered.wait()
            wgrad = grad.t() @ total.reshape(-1, total.shape[-1])
            bgrad = grad.new_empty(grad.shape[-1]) if ctx.biased else None  # comes with the product
        elif ctx.biased:
            bgrad = grad.sum(0)
        if summed is not None:
            summed.wait()
        return wgrad, None if dgrad is None else dgrad.view(ctx.shape), bgrad, None, None


def _grad_of_input(ctx: Any, grad: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor | None, Any]:
    """The gradient, and the work of its sum over ranks."""
    way: _AcrossRanks = ctx.way
    if not ctx.needs_input_grad[1]:
        return None, None
    dgrad = grad @ weight.to(grad.dtype)
    if way.mode != "column":
        return dgrad, None
    return (reduce_scatter if way.sequence_parallel else all_reduce)(dgrad, way.group, async_op=True)


def _first_values(weight: torch.Tensor) -> None:
    torch.nn.init.normal_(weight, mean=0.0, std=FIRST_SPREAD)


def _part(size: int, parts: int) -> int:
    assert size % parts == 0, f"{size} is not divisible by {parts}"
    return size // parts


def _mark(parameter: Any, dim: int) -> None:
    """As `set_tensor_model_parallel_attributes`."""
    parameter.tensor_model_parallel, parameter.partition_dim, parameter.partition_stride = True, dim, 1
