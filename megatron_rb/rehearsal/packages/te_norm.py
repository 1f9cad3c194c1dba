"""`LayerNorm` and `RMSNorm` of `transformer_engine.pytorch` as a rehearsal stands in for them.

Signatures, checks and saved tensors of `pytorch/module/{layernorm,rmsnorm}.py` and `pytorch/ops/basic/` in v2.9 of
github.com/NVIDIA/TransformerEngine.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch

__all__ = ["LayerNorm", "RMSNorm"]


class _Norm(torch.nn.Module):
    weight: torch.nn.Parameter
    names: tuple[str, ...]
    """Of its parameters."""

    def __init__(
        self,
        normalized_shape=None,
        eps=1e-5,
        sequence_parallel=None,
        params_dtype=None,
        zero_centered_gamma=False,
        hidden_size=None,
        **kwargs,
    ) -> None:
        super().__init__()
        self.eps, self.zero_centered_gamma = eps, zero_centered_gamma
        self.sequence_parallel = sequence_parallel
        if params_dtype is not None:
            if "dtype" in kwargs:
                raise RuntimeError("Both `dtype` and `params_dtype` (deprecated) kwargs are provided")
            kwargs["dtype"] = params_dtype
        self._make_parameters(_shape(normalized_shape, hidden_size), **kwargs)

    def _make_parameters(
        self, shape: tuple[int, ...], *, device: Any = None, dtype: torch.dtype | None = None, sm_margin: Any = 0
    ) -> None:
        for name in self.names:
            value = torch.empty(shape, device="cuda" if device is None else device, dtype=dtype)
            self.register_parameter(name, torch.nn.Parameter(value))
        if device != "meta":
            self.reset_parameters()

    def reset_parameters(self, defer_init: bool | None = None) -> None:
        """First values; those on the meta device are made on the real one."""
        if defer_init:
            return
        for name in self.names:
            parameter = getattr(self, name)
            if parameter.device.type == "meta":
                parameter = torch.nn.Parameter(torch.empty_like(parameter, device="cuda"))
            ones = name == "weight" and not self.zero_centered_gamma
            (torch.nn.init.ones_ if ones else torch.nn.init.zeros_)(parameter)
            self._parameters[name] = parameter
            if self.sequence_parallel is not None:
                parameter.sequence_parallel = self.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The normalised input.

        Raises:
            ValueError: its last dimensions are not those of the weight.
        """
        shape = tuple(self.weight.shape)
        if x.shape[-len(shape) :] != shape:
            raise ValueError(
                f"Input tensor (shape={tuple(x.shape)}) and weight tensor (shape={shape}) are not compatible"
            )
        return _Normalised.apply(x, *(getattr(self, name) for name in self.names))


class EngineLayerNorm(_Norm):
    names = ("weight", "bias")


class EngineRMSNorm(_Norm):
    names = ("weight",)


LayerNorm, RMSNorm = EngineLayerNorm, EngineRMSNorm


class _Normalised(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        weight = parameters[0]
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else weight.dtype
        rows = x.contiguous().to(dtype).view(-1, weight.numel())
        # The inverse deviation of every row, before it the mean where there is a bias.
        numbers = [rows.new_empty(rows.shape[0], dtype=torch.float32) for _ in parameters]
        ctx.save_for_backward(rows, *numbers)
        ctx.parameters = parameters
        return torch.empty_like(rows).view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows = ctx.saved_tensors[0]
        grad = grads[0].contiguous().to(rows.dtype)
        return torch.empty_like(rows).view(grad.shape), *(torch.empty_like(each) for each in ctx.parameters)


def _shape(normalized_shape: Any, hidden_size: int | None) -> tuple[int, ...]:
    """Both names of one argument."""
    if normalized_shape is None:
        if hidden_size is None:
            raise RuntimeError("Neither `normalized_shape` nor `hidden_size` (deprecated) args are provided")
        warnings.warn("`hidden_size` arg has been renamed to `normalized_shape`", DeprecationWarning, stacklevel=2)
        normalized_shape = hidden_size
    elif hidden_size is not None:
        raise RuntimeError("Both `normalized_shape` and `hidden_size` (deprecated) args are provided")
    return tuple(normalized_shape) if isinstance(normalized_shape, Iterable) else (normalized_shape,)
