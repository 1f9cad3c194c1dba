"""`Watch`: sees every operation of a rehearsed rank. The host computes; what is on the device only has shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from megatron_rb.rehearsal.arithmetic import Arithmetic
from megatron_rb.rehearsal.device import Waits
from megatron_rb.rehearsal.memory import DeviceMemory
from megatron_rb.rehearsal.messages import Messages
from megatron_rb.rehearsal.oracle import Oracle
from megatron_rb.rehearsal.shapes import Shapes
from megatron_rb.rehearsal.sites import site

READS_SIZES = frozenset({"aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim", "aten::equal"})
"""Operators whose result has a size, or a truth, that the host has to learn from the device."""


class Watch(TorchDispatchMode):
    """Runs operations on the host as they are, and those of the device without values; counts what they do.

    It belongs to the thread that enters it, and to the threads of its backward passes. Other threads, which load and
    pack data, compute as always.
    """

    def __init__(
        self,
        memory: DeviceMemory,
        waits: Waits,
        messages: Messages,
        oracle: Oracle,
        is_pinned: Callable[[torch.Tensor], bool],
        device_type: str = "cuda",
    ) -> None:
        super().__init__()
        self.device_type = device_type
        self.memory, self.waits, self.messages, self.oracle = memory, waits, messages, oracle
        self._is_pinned = is_pinned
        self._shapes = Shapes()
        self._lifts: list[bool] = []
        self.operations = 0
        """Of the device, views among them."""
        self.arithmetic = Arithmetic()

    def __enter__(self) -> Watch:
        self._lifts.append(torch._C._only_lift_cpu_tensors())
        # So that `torch.tensor(values, device=...)` makes its values on the host and copies them.
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(self._lifts.pop())

    def restart(self) -> None:
        """Begin to count anew."""
        self.operations = 0
        self.arithmetic.restart()

    def without_values(self, shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
        """A tensor that has no values, as those of the device have none."""
        with self._shapes:
            return torch.empty(shape, dtype=dtype, device=device)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        keywords = dict(kwargs or {})
        name = func._schema.name
        if name == "prim::device" and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # half of all calls: every `tensor.device`
        if name.startswith("c10d::"):
            return self.messages.answer(func, args, keywords)
        if not any(issubclass(kind, FakeTensor) for kind in types) and not self._on_device(keywords.get("device")):
            return func(*args, **keywords)
        if name == "aten::_local_scalar_dense":
            return self._read(args[0])
        self._note_wait(name, args, keywords)
        if name.startswith("megatron_rb::"):
            self.arithmetic.windows(func, args, keywords)
            # Their own code runs, so that it allocates what it allocates and starts what it starts.
            with self:
                return OPDEFS[name]._init_fn(*args, **keywords)
        out = self._shapes.answer(func, types, args, keywords)
        self._count(func, args, keywords, out)
        return out

    def _count(self, func: Any, args: tuple[Any, ...], keywords: dict[str, Any], out: Any) -> None:
        device = False
        for tensor in (out,) if isinstance(out, torch.Tensor) else tree_iter(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == self.device_type:
                self.memory.note(tensor)
                device = True
        self.operations += device
        if device:
            self.arithmetic.operator(func, args, keywords, out)
            if func._schema.name == "aten::_to_copy" and args[0].device.type == "cpu":
                self.arithmetic.sent(args[0], out)

    def read_all(self, tensor: torch.Tensor) -> Any:
        """Stands in for `tolist` of a tensor without values: one transfer."""
        if tensor.device.type == self.device_type:
            self.waits.note("values read")
        return self.oracle.values(tensor.shape, tensor.dtype, site())

    def _read(self, tensor: torch.Tensor) -> bool | int | float:
        if tensor.device.type == self.device_type:
            self.waits.note("value read")
        return self.oracle.value(tensor.dtype)

    def _note_wait(self, name: str, args: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
        if name in ("aten::_to_copy", "aten::copy_"):
            self._note_copy(name, args, keywords)
        elif name in READS_SIZES or (name == "aten::repeat_interleave" and keywords.get("output_size") is None):
            self.waits.note(name.removeprefix("aten::"))
        elif name in ("aten::index", "aten::index_put_", "aten::_index_put_impl_"):
            masked = any(isinstance(each, torch.Tensor) and each.dtype == torch.bool for each in args[1] or ())
            # One value of the host that is put where a mask is true is filled in on the device.
            if masked and not (name != "aten::index" and args[2].numel() == 1 and args[2].device.type == "cpu"):
                self.waits.note("index of booleans")

    def _note_copy(self, name: str, args: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
        inplace = name == "aten::copy_"
        source = args[1] if inplace else args[0]
        target = args[0].device if inplace else keywords.get("device") or source.device
        ways = source.device.type, torch.device(target).type
        freely = args[2] if inplace and len(args) > 2 else keywords.get("non_blocking", False)
        if ways == (self.device_type, "cpu") and not freely:
            self.waits.note("copy to the host")
        elif ways == ("cpu", self.device_type) and source.numel() and not (freely and self._is_ready(source)):
            self.waits.note("copy from pageable memory" if freely else "copy to the device")

    def _is_ready(self, source: torch.Tensor) -> bool:
        return not isinstance(source, FakeTensor) and self._is_pinned(source)

    def _on_device(self, device: Any) -> bool:
        return device is not None and torch.device(device).type == self.device_type
