"""Every operator of the simulated device: torch's CPU kernel, run on the same memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from tests.platform.simulated_musa.memory import device_type, is_simulated, on_device, on_host

_CPU_KERNELS = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
VIEWS = ("as_strided", "view", "_reshape_alias", "unfold", "_local_scalar_dense", "view_as_real", "view_as_complex")
"""Made by the CPU's kernels on the device's tensor itself: they only rearrange its sizes, or read one value."""
FUSED = ("native_layer_norm", "silu_backward")
"""Operators for which torch would put several together where a device brings none of its own."""
AUTOCAST_LOW = ("matmul", "mm", "bmm", "addmm", "addbmm", "baddbmm", "linear", "einsum", "scaled_dot_product_attention")
AUTOCAST_FP32 = ("softmax.int", "log_softmax.int", "layer_norm", "nll_loss", "cross_entropy_loss", "mse_loss")
"""What torch's accelerators cast to the low precision and to fp32 under autocast; a part of their list."""


class Kernels:
    """Registers the operators; the libraries live as long as this object."""

    def __init__(self, current_device: Callable[[], int], next_seed: Callable[[], int]) -> None:
        self._current_device = current_device
        self._next_seed = next_seed
        self._everything = torch.library.Library("_", "IMPL")
        self._everything.fallback(self._on_host, "PrivateUse1")
        self._everything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
        self._aten = torch.library.Library("aten", "IMPL")
        for name in VIEWS:
            self._override(name, _cpu_kernel(name))
        for name in FUSED:
            self._override(name, partial(self._on_host, _operator(name)))
        self._override("empty.memory_format", self._empty)
        self._override("empty_strided", self._empty_strided)
        self._override("_copy_from", _copy_from)
        self._override("resize_", _resize)
        self._override("_to_copy", _to_copy)
        self._override("set_.source_Storage_storage_offset", _cpu_kernel("set_", "source_Storage_storage_offset"))
        for name in AUTOCAST_LOW:
            self._autocast(name, lambda: torch.get_autocast_dtype(device_type()))
        for name in AUTOCAST_FP32:
            self._autocast(name, lambda: torch.float32)

    def replace(self, name: str, kernel: Callable) -> None:
        """Take another kernel for an operator; it gets the right one as its first argument."""
        self._override(name, partial(kernel, partial(self._on_host, _operator(name))))

    def _override(self, name: str, kernel: Callable) -> None:
        self._aten.impl(name, kernel, "PrivateUse1")

    def _autocast(self, name: str, dtype: Callable[[], torch.dtype]) -> None:
        operator = _operator(*name.split("."))

        def cast(*args: Any, **kwargs: Any) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)):
                return operator(*tree_map(lambda v: _cast(v, dtype()), args), **kwargs)

        self._aten.impl(name, cast, "AutocastPrivateUse1")

    def _empty(self, size, *, dtype=None, device=None, memory_format=None, **_: Any) -> torch.Tensor:
        return on_device(torch.empty(size, dtype=dtype, device="cpu", memory_format=memory_format), self._index(device))

    def _empty_strided(self, size, stride, *, dtype=None, device=None, **_: Any) -> torch.Tensor:
        return on_device(torch.empty_strided(size, stride, dtype=dtype, device="cpu"), self._index(device))

    def _index(self, device: torch.device | None) -> int:
        return self._current_device() if device is None or device.index is None else device.index

    def _on_host(self, operator, *args: Any, **kwargs: Any) -> Any:
        """Run an operator on the host's view of its tensors; what it returns becomes a tensor of the device."""
        _refuse_mixed(operator, args, kwargs)
        call = _HostCall(self._index)
        args, kwargs = tree_map(call.to_host, (args, kwargs))
        outs = call.without_empty_outs(operator, kwargs)
        with self._seeded(operator):
            result = operator(*args, **kwargs)
        call.fill_outs(outs)
        return tree_map(call.to_device, result)

    @contextmanager
    def _seeded(self, operator) -> Iterator[None]:
        """Random operators draw from the device's generator, not from the host's."""
        if torch.Tag.nondeterministic_seeded not in operator.tags:
            yield
            return
        state = torch.default_generator.get_state()
        torch.default_generator.manual_seed(self._next_seed())
        try:
            yield
        finally:
            torch.default_generator.set_state(state)


class _HostCall:
    """The tensors of one call on both sides."""

    def __init__(self, index_of: Callable[[torch.device | None], int]) -> None:
        self._index_of = index_of
        self._index: int | None = None
        self._given: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def to_host(self, value: Any) -> Any:
        if isinstance(value, torch.device) and is_simulated(value):
            self._index = self._index_of(value) if self._index is None else self._index
            return torch.device("cpu")
        if not isinstance(value, torch.Tensor) or not is_simulated(value):
            return value
        self._index = value.device.index if self._index is None else self._index
        host = on_host(value)
        self._given[id(host)] = (host, value)
        return host

    def to_device(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) in self._given:  # in-place operators return what they were given
            return self._given[id(value)][1]
        return on_device(value, self._index_of(None) if self._index is None else self._index)

    def without_empty_outs(self, operator, kwargs: dict[str, Any]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Replace outputs that the operator is to size, since shared memory cannot grow; (host, device) pairs."""
        replaced = []
        for argument in operator._schema.arguments:
            host = kwargs.get(argument.name)
            if argument.is_out and isinstance(host, torch.Tensor) and host.numel() == 0 and id(host) in self._given:
                target = self._given[id(host)][1]
                kwargs[argument.name] = fresh = torch.empty_like(host)
                self._given[id(fresh)] = (fresh, target)
                replaced.append((fresh, target))
        return replaced

    def fill_outs(self, outs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        for host, target in outs:
            result = on_device(host, target.device.index)
            target.set_(result.untyped_storage(), 0, result.size(), result.stride())


def _operator(name: str, overload: str = "default"):
    return getattr(getattr(torch.ops.aten, name), overload)


def _cpu_kernel(name: str, overload: str = "default") -> Callable:
    operator = _operator(name, overload)
    return lambda *args, **kwargs: operator.redispatch(_CPU_KERNELS, *args, **kwargs)


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    host_source, host_target = (on_host(t) if is_simulated(t) else t for t in (source, target))
    host_target.copy_(host_source)
    return target


def _to_copy(
    tensor: torch.Tensor,
    *,
    dtype=None,
    layout=None,
    device=None,
    pin_memory=None,
    non_blocking=False,
    memory_format=torch.preserve_format,
) -> torch.Tensor:
    """torch's own would ask for pinned memory when a copy to the host need not be waited for."""
    target = torch.empty_like(tensor, dtype=dtype, device=device, memory_format=memory_format or torch.preserve_format)
    return target.copy_(tensor)


def _resize(tensor: torch.Tensor, size, *, memory_format=None) -> torch.Tensor:
    larger = torch.empty(size, dtype=tensor.dtype, device=tensor.device)
    kept = min(larger.numel(), tensor.numel())
    larger.view(-1)[:kept].copy_(tensor.reshape(-1)[:kept])
    return tensor.set_(larger.untyped_storage(), 0, larger.size(), larger.stride())


def _refuse_mixed(operator, args: Any, kwargs: Any) -> None:
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
    indexing = operator.overloadpacket.__name__ in ("index", "index_put", "index_put_", "_index_put_impl_")
    devices = {t.device for t in tensors if is_simulated(t) or (t.dim() and not indexing)}
    if len(devices) > 1 and any(is_simulated(t) for t in tensors):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {operator} got tensors on "
            f"{' and on '.join(sorted(map(str, devices)))}"
        )


def _cast(value: Any, dtype: torch.dtype) -> Any:
    castable = isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype != torch.float64
    return value.to(dtype) if castable and is_simulated(value) else value
