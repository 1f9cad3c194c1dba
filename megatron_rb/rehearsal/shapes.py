"""`Shapes`: torch's tensors without values, by shorter ways where an operation has been seen before or is a plain view.

`FakeTensorMode` takes 0.1 to 0.3 ms for an operation, nearly all of it in Python; a rehearsal is made of little else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import torch
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_iter

Key: TypeAlias = tuple[object, ...]

_aten = torch.ops.aten
VIEWS = frozenset(
    {
        _aten._unsafe_view.default,
        _aten.alias.default,
        _aten.as_strided.default,
        _aten.detach.default,
        _aten.expand.default,
        _aten.permute.default,
        _aten.select.int,
        _aten.slice.Tensor,
        _aten.squeeze.dim,
        _aten.t.default,
        _aten.transpose.int,
        _aten.unsqueeze.default,
        _aten.view.default,
    }
)
"""Their kernels look at sizes alone: what the one for tensors of the meta device makes, that of any device makes."""
PLAIN = frozenset({int, float, bool, str, type(None), torch.dtype, torch.layout, torch.memory_format})
"""Types of arguments whose values tell all."""
FROM_HOST = frozenset({_aten._to_copy.default, _aten.copy_.default})
"""Take tensors of the host, which have values, and look at their shapes alone."""
NAMESPACES = frozenset({"aten", "torch_attn"})
"""Of torch itself."""
DEPENDS_ON_VALUES = frozenset({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view})


@dataclass(frozen=True)
class Fresh:
    """A result that shares its storage with no other tensor, and fills it."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Same:
    """The result is the first argument, whose values have changed."""


Result: TypeAlias = Fresh | Same | tuple[Fresh, ...] | None
"""None = torch has to be asked every time."""


class Shapes(FakeTensorMode):
    """Answers as `FakeTensorMode` does. What has been seen holds for all of a process's ranks."""

    _seen: dict[Key, Result] = {}

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    def answer(self, func: Any, types: Any, args: tuple[Any, ...], keywords: Mapping[str, Any]) -> Any:
        """The result of an operation, made without its values."""
        if func in VIEWS:
            out = self._view(func, args, keywords)
            return self.__torch_dispatch__(func, types, args, keywords) if out is None else out
        key = self._key(func, args, keywords) if may_be_kept(func) else None
        if key is None:
            return self.__torch_dispatch__(func, types, args, keywords)
        if key not in self._seen:
            return self._learn(key, func, types, args, keywords)
        result = self._seen[key]
        if isinstance(result, Fresh):
            return self._make(result)
        if isinstance(result, tuple):
            return tuple([self._make(each) for each in result])
        return args[0] if isinstance(result, Same) else self.__torch_dispatch__(func, types, args, keywords)

    def _view(self, func: OpOverload, args: tuple[Any, ...], keywords: Mapping[str, Any]) -> FakeTensor | None:
        """None where torch has more to do, among it to say what is wrong."""
        source = args[0]
        if type(source) is not FakeTensor or not self._is_ordinary(source):
            return None
        try:
            with in_kernel_invocation_manager(self):
                view = func(*args, **keywords)
        except (RuntimeError, IndexError):
            return None
        return FakeTensor(self, view, source.fake_device)

    def _key(self, func: OpOverload, args: tuple[Any, ...], keywords: Mapping[str, Any]) -> Key | None:
        """All that a result depends on; None for what is out of the ordinary."""
        parts: list[object] = [func, torch.get_default_dtype(), torch.is_inference_mode_enabled(), *keywords]
        host = func in FROM_HOST
        known = self._describe(args, parts, host) and self._describe(keywords.values(), parts, host)
        return tuple(parts) if known else None

    def _describe(self, values: Iterable[Any], parts: list[object], host: bool) -> bool:
        """Add what tells one call from another; False for what is out of the ordinary."""
        for value in values:
            kind = type(value)
            if kind is FakeTensor:
                if not self._is_ordinary(value):
                    return False
                parts += (value.dtype, value.shape, value.stride(), value.fake_device)
            elif kind in PLAIN:
                parts += (kind, value)
            elif kind is list or kind is tuple or kind is torch.Size:
                parts += (kind, len(value))
                if not self._describe(value, parts, host):
                    return False
            elif kind is torch.device and (value.index is not None or value.type == "cpu"):
                parts.append(value)
            elif host and kind is torch.Tensor and _is_plain(value):
                parts += (kind, value.dtype, value.shape, value.stride(), value.device)
            else:
                return False
        return True

    def _is_ordinary(self, tensor: FakeTensor) -> bool:
        return tensor.constant is None and tensor.fake_mode is self and _is_plain(tensor)

    def _learn(self, key: Key, func: OpOverload, types: Any, args: tuple[Any, ...], keywords: Mapping[str, Any]) -> Any:
        """Ask torch, and keep what it says where that can be made again."""
        out = self.__torch_dispatch__(func, types, args, keywords)
        unchanged = self._key(func, args, keywords) == key
        self._seen[key] = self._result(func, out, args, keywords) if unchanged else None
        return out

    def _result(self, func: OpOverload, out: Any, args: tuple[Any, ...], keywords: Mapping[str, Any]) -> Result:
        if func._schema.is_mutable:
            return Same() if out is args[0] else None
        taken = {_storage(each) for each in tree_iter((args, keywords)) if isinstance(each, torch.Tensor)}
        if not isinstance(out, tuple):
            return self._fresh(out, taken)
        found = []
        for each in out:
            result = self._fresh(each, taken)
            if result is None:
                return None
            found.append(result)
            taken.add(_storage(each))
        return tuple(found)

    def _fresh(self, out: Any, taken: Set[int]) -> Fresh | None:
        if type(out) is not FakeTensor or not self._is_ordinary(out) or _storage(out) in taken:
            return None
        result = Fresh(tuple(out.shape), out.stride(), out.dtype, out.fake_device)
        return result if _is_alike(self._make(result), out) else None

    def _make(self, result: Fresh) -> FakeTensor:
        with no_dispatch():
            empty = torch.empty_strided(result.shape, result.stride, dtype=result.dtype, device="meta")
        return FakeTensor(self, empty, result.device)


@cache
def may_be_kept(func: Any) -> bool:
    """Whether what an operator makes of the same shapes is always the same: new tensors, or its first argument."""
    if (
        not isinstance(func, OpOverload)
        or func.namespace not in NAMESPACES
        or DEPENDS_ON_VALUES.intersection(func.tags)
    ):
        return False
    schema = func._schema
    results = [result.alias_info for result in schema.returns]
    first, *others = [argument.alias_info for argument in schema.arguments] or [None]
    if any(others) or not results or "lift" in schema.name:
        return False
    if first is None:
        return not any(results)
    return first.is_write and len(results) == 1 and results[0] is not None


def _is_plain(tensor: torch.Tensor) -> bool:
    strided = tensor.layout is torch.strided and not tensor.dtype.is_complex
    return strided and not tensor.is_neg() and not tensor.is_inference()


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _is_alike(made: FakeTensor, out: FakeTensor) -> bool:
    """Whether what was made from a result is what torch has made."""
    return (
        made.storage_offset() == out.storage_offset()
        and made.untyped_storage().nbytes() == out.untyped_storage().nbytes()
        and made.requires_grad == out.requires_grad
        and torch._C._dispatch_keys(made) == torch._C._dispatch_keys(out)
    )
