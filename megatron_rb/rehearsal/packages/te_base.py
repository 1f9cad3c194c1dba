"""Transformer Engine as a rehearsal stands in for it: what its modules share.

Of `transformer_engine/pytorch/module/base.py`, `distributed.py` and `utils.py` in v2.9 of
github.com/NVIDIA/TransformerEngine, without FP8 and without communication that overlaps products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.distributed as dist

__all__: list[str] = []
"""The package itself has nothing but its parts."""


class TransformerEngineBaseModule(torch.nn.Module):
    """Parameters that are set when the module is built, and the checks before a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.tp_group: dist.ProcessGroup | None = None
        self.tp_size = 1
        self.tp_group_initialized = False
        self.sequence_parallel = False
        self.fp8_meta: dict[str, Any] = {}
        self.activation_dtype: torch.dtype | None = None
        self._first_values: dict[str, tuple[Callable[[torch.Tensor], Any], Callable[[], Any] | None]] = {}

    def set_tensor_parallel_group(self, tp_group: dist.ProcessGroup | None) -> None:
        self.tp_group, self.tp_group_initialized = tp_group, True

    def register_initialised(self, name: str, value: torch.Tensor, first: Callable, tracker: Callable | None) -> None:
        """Register a parameter with what sets its first values, and the generators under which it does."""
        super().register_parameter(name, torch.nn.Parameter(value))
        self._first_values[name] = first, tracker

    def reset_parameters(self, defer_init: bool | None = False) -> None:
        """First values; those on the meta device are made on the real one."""
        if defer_init:
            return
        for name, (first, tracker) in self._first_values.items():
            parameter = getattr(self, name)
            if parameter.device.type == "meta":
                parameter = torch.nn.Parameter(torch.empty_like(parameter, device="cuda"))
            with torch.no_grad():
                _under(tracker, getattr(self, "rng_tracker_name", None), first, parameter)
            self._parameters[name] = parameter

    def prepare(self, inp: torch.Tensor, allow_non_contiguous: bool = False) -> torch.Tensor:
        """As `prepare_forward`.

        Raises:
            AssertionError: the input is not on the device, or has another type than the parameters.
        """
        assert inp.device.type == "cuda", "TransformerEngine needs CUDA."
        if self.tp_size > 1:
            assert self.tp_group_initialized, "TP group not initialized."
        if torch.is_autocast_enabled("cuda"):
            self.activation_dtype = torch.get_autocast_dtype("cuda")
        elif self.activation_dtype != inp.dtype:
            for name, parameter in self.named_parameters():
                assert inp.dtype == parameter.dtype, (
                    "Data types for parameters must match when outside of autocasted region. "
                    f" Found input dtype: {inp.dtype} and {name!r} dtype: {parameter.dtype}"
                )
            self.activation_dtype = inp.dtype
        return inp if allow_non_contiguous or inp.is_contiguous() else inp.contiguous()

    def set_extra_state(self, state: Any) -> None:
        """Of FP8 alone."""

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)


def _under(tracker: Callable | None, name: str | None, first: Callable, parameter: torch.Tensor) -> None:
    if tracker is None:
        first(parameter)
    else:
        with tracker().fork(name) if name else tracker().fork():
            first(parameter)


def world_size(group: dist.ProcessGroup | None) -> int:
    if not dist.is_initialized() or group is None:
        return 1
    return dist.get_world_size(group=group)


def gather(inp: torch.Tensor, group: Any, async_op: bool = False) -> tuple[torch.Tensor, Any]:
    """As `gather_along_first_dim`."""
    if world_size(group) == 1:
        return inp, None
    out = inp.new_empty((inp.shape[0] * world_size(group), *inp.shape[1:]))
    return out, dist.all_gather_into_tensor(out, inp.contiguous(), group=group, async_op=async_op)


def reduce_scatter(inp: torch.Tensor, group: Any, async_op: bool = False) -> tuple[torch.Tensor, Any]:
    """As `reduce_scatter_along_first_dim`."""
    size = world_size(group)
    if size == 1:
        return inp, None
    assert inp.shape[0] % size == 0, "First dimension of the tensor should be divisible by tensor parallel size"
    out = inp.new_empty((inp.shape[0] // size, *inp.shape[1:]))
    return out, dist.reduce_scatter_tensor(out, inp.contiguous(), group=group, async_op=async_op)


def all_reduce(inp: torch.Tensor, group: Any, async_op: bool = False) -> tuple[torch.Tensor, Any]:
    """As `allreduce`."""
    if world_size(group) == 1:
        return inp, None
    return inp, dist.all_reduce(inp, group=group, async_op=async_op)


def refuse(what: str) -> NoReturn:
    """Say that a part of the package is not stood in for.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError(f"a rehearsal stands in for Transformer Engine without {what}")


def refused(name: str) -> Any:
    """A function of the package that is not stood in for, so that it can be imported."""

    def function(*_: Any, **__: Any) -> NoReturn:
        refuse(name)

    function.__name__ = name
    return function


def refused_class(name: str) -> Any:
    """As `refused`, a class: others may inherit from it, none can be made."""
    return type(name, (torch.nn.Module,), {"__init__": refused(name)})
