"""What a restricted unpickler builds in place of foreign objects: inert stand-ins and checked constructors.

A hostile pickle calls everything that it is handed with arguments of its choice, and sets attributes on it. So classes
here refuse new attributes, callables have none, and each constructor checks what it is given.
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch

from megatron_rb.checkpoint.storage.mosaic import strided_chunks
from megatron_rb.checkpoint.storage.tensors import DamagedFile, StoredTensor

_NUMPY_TYPE = re.compile(r"[<>=|]?([biufcSU]\d+|\?)")


class UnsafePickle(ValueError):
    """A pickle asks for something that is not on the list of harmless things."""


class _FrozenType(type):
    def __setattr__(cls, name: str, value: Any) -> None:
        raise UnsafePickle(f"a pickle tries to change the class {cls.__name__}")


class Opaque(metaclass=_FrozenType):
    """Inert stand-in for an object whose class is never imported.

    Entries of a pickled state that is a dict are readable as attributes.
    """

    __slots__ = ("args", "entries", "state")
    type_name = ""
    """`module.Name` of the class in the pickle."""
    args: tuple[Any, ...]
    """What its constructor was to be called with; for an enum member its value, or its name."""
    state: Any
    """The pickled state, normally a dict of attributes; None = it has none."""
    entries: list[Any]
    """Items of a pickled subclass of list, `(key, value)` pairs of one of dict."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Opaque:
        self = super().__new__(cls)
        self.args = (*args, *kwargs.values())
        self.state = None
        self.entries = []
        return self

    def __setstate__(self, state: Any) -> None:
        # Classes with slots are pickled as (attributes or None, slots).
        if isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], dict):
            state = {**(state[0] or {}), **state[1]} if isinstance(state[0], dict | None) else state
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.entries.append((key, value))

    def append(self, item: Any) -> None:
        self.entries.append(item)

    def extend(self, items: Iterable[Any]) -> None:
        self.entries.extend(items)

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__") and isinstance(self.state, dict) and name in self.state:
            return self.state[name]
        raise AttributeError(f"the pickled {self.type_name} has no attribute {name}")

    def __repr__(self) -> str:
        return f"Opaque({self.type_name}{self.args if self.args else ''})"


def opaque_class(type_name: str) -> type[Opaque]:
    """A class of stand-ins for one pickled class."""
    return _FrozenType("Opaque", (Opaque,), {"__slots__": (), "type_name": type_name})  # type: ignore[return-value]


class Constructor:
    """A function that a pickle may call; nothing can be set on it."""

    __slots__ = ("_function", "_name")

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self._name = name
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self._function(*args, **kwargs)
        except (TypeError, ValueError, OverflowError) as error:
            if isinstance(error, UnsafePickle | DamagedFile):
                raise
            raise UnsafePickle(f"{self._name} is called with arguments that no writer uses ({error})") from error

    def __setstate__(self, state: Any) -> None:
        raise UnsafePickle(f"a pickle tries to change {self._name}")

    def __repr__(self) -> str:
        return f"Constructor({self._name})"


class Tag:
    """A name that is only passed on to a constructor, such as a storage class; it can neither be called nor changed."""

    __slots__ = ("name", "value")

    def __init__(self, name: str, value: Any = None) -> None:
        self.name = name
        self.value = value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise UnsafePickle(f"a pickle calls {self.name}, which no writer does")

    def __setstate__(self, state: Any) -> None:
        raise UnsafePickle(f"a pickle tries to change {self.name}")

    def __repr__(self) -> str:
        return f"Tag({self.name})"


@dataclass(frozen=True)
class StoredStorage:
    """The bytes that tensors of a torch file are views of."""

    dtype: torch.dtype | None
    """None: of bytes; the tensor says its type itself."""
    num_bytes: int
    path: Path
    position: int

    def __setstate__(self, state: Any) -> None:
        raise UnsafePickle("a pickle tries to change the place of a tensor")


class PickledTensor(StoredTensor):
    """A `StoredTensor` that the pickle it comes from cannot point to another place; copies are plain ones."""

    def __setstate__(self, state: Any) -> None:
        raise UnsafePickle("a pickle tries to change the place of a tensor")

    def __reduce__(self) -> tuple[Any, ...]:
        return StoredTensor, (self.name, self.dtype, self.shape, self.chunks)


# Tensors


def rebuild_tensor(
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    requires_grad: Any = False,
    hooks: Any = None,
    metadata: Any = None,
) -> Any:
    """A tensor as a view of its storage, `torch._utils._rebuild_tensor_v2`."""
    return _view(storage, None, offset, size, stride, metadata)


def rebuild_tensor_of_bytes(
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    requires_grad: Any,
    hooks: Any,
    dtype: Any,
    metadata: Any = None,
) -> Any:
    """A tensor that names its type itself, `torch._utils._rebuild_tensor_v3`."""
    return _view(storage, dtype, offset, size, stride, metadata)


def rebuild_parameter(data: Any, requires_grad: Any = True, hooks: Any = None, state: Any = None) -> Any:
    """The tensor of a `torch.nn.Parameter`; its attributes are left out."""
    if not isinstance(data, StoredTensor | Opaque):
        raise TypeError("a parameter is made of a tensor")
    return data


def rebuild_from_type(function: Any, kind: Any, args: Any, state: Any = None) -> Any:
    """A tensor with attributes (left out), or a stand-in for one of a vendor's class."""
    if isinstance(kind, type) and issubclass(kind, Opaque):
        return kind(*args)
    if not (isinstance(kind, Tag) and isinstance(function, Constructor)):
        raise TypeError("neither a tensor nor a parameter")
    return function(*args)


def _view(storage: Any, dtype: Any, offset: Any, size: Any, stride: Any, metadata: Any) -> StoredTensor | Opaque:
    if isinstance(storage, Opaque):
        return opaque_class("torch.Tensor")(storage, offset, size, stride)
    if not isinstance(storage, StoredStorage):
        raise TypeError("a tensor without a storage")
    if metadata:
        raise UnsafePickle("a tensor that is lazily conjugated or negated; save it with resolve_conj().resolve_neg()")
    dtype = dtype or storage.dtype
    shape, strides = _counts(size), _counts(stride)
    (start,) = _counts([offset])
    if not isinstance(dtype, torch.dtype) or len(shape) != len(strides):
        raise TypeError("a tensor without a type, or with another number of strides than dimensions")
    last = start + sum((length - 1) * step for length, step in zip(shape, strides, strict=True))
    if math.prod(shape) and (last + 1) * dtype.itemsize > storage.num_bytes:
        raise DamagedFile(
            f"{storage.path}: a tensor of shape {shape} ends beyond the {storage.num_bytes} bytes of its storage"
        )
    position = storage.position + start * dtype.itemsize
    chunks = tuple(strided_chunks(shape, strides, storage.path, position, dtype.itemsize))
    return PickledTensor("", dtype, shape, chunks)


def _counts(values: Any) -> tuple[int, ...]:
    counts = tuple(values)
    if any(type(count) is not int or count < 0 for count in counts):
        raise TypeError("sizes, strides and offsets are whole numbers")
    return counts


# numpy


class PickledDtype:
    """A numpy type of plain numbers or text; object and structured types are refused."""

    __slots__ = ("_order", "_spec")

    def __init__(self, spec: Any, align: Any = False, copy: Any = True) -> None:
        if not isinstance(spec, str) or not _NUMPY_TYPE.fullmatch(spec):
            raise UnsafePickle(f"a numpy array of type {spec!r}; only plain numbers and text are read")
        self._spec = spec.lstrip("<>=|")
        self._order = spec[0] if spec[0] in "<>=|" else "|"

    def __setstate__(self, state: Any) -> None:
        if not (isinstance(state, tuple) and len(state) >= 5 and state[1] in ("<", ">", "=", "|")):
            raise UnsafePickle("a numpy type with a state that no writer uses")
        if any(part is not None for part in state[2:5]):
            raise UnsafePickle("a structured numpy type; only plain numbers and text are read")
        self._order = state[1]

    @property
    def real(self) -> np.dtype:
        return np.dtype(f"{self._order}{self._spec}")


class PickledArray(np.ndarray):
    """An array filled by its pickled state, which is checked first."""

    def __setstate__(self, state: Any, /) -> None:
        _, shape, dtype, is_fortran, data = state
        if not isinstance(dtype, PickledDtype) or not isinstance(data, bytes):
            raise UnsafePickle("a numpy array whose content is not plain bytes")
        shape = _counts(shape)
        if math.prod(shape) * dtype.real.itemsize != len(data):
            raise UnsafePickle(f"a numpy array of shape {shape} with {len(data)} bytes")
        super().__setstate__((1, shape, dtype.real, bool(is_fortran), data))  # type: ignore[arg-type]


def _numpy_array(kind: Any, shape: Any, dtype: Any) -> np.ndarray:
    return PickledArray((0,), np.uint8)


def _numpy_from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    if not isinstance(data, bytes | bytearray) or not isinstance(dtype, PickledDtype) or order not in ("C", "F"):
        raise TypeError("bytes, a type and an order are expected")
    return np.frombuffer(data, dtype.real).reshape(_counts(shape), order=order)


def _numpy_scalar(dtype: Any, data: Any) -> Any:
    if not isinstance(dtype, PickledDtype) or not isinstance(data, bytes) or len(data) != dtype.real.itemsize:
        raise TypeError("a type and as many bytes are expected")
    return np.frombuffer(data, dtype.real)[0]


# Python


def _encode(text: Any, encoding: Any) -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise TypeError("text as latin1 is expected")
    return text.encode("latin1")


def _bytearray(data: Any = b"", encoding: Any = "latin-1") -> bytearray:
    return bytearray(data if isinstance(data, bytes) else _encode(data, encoding))


def _from_items(kind: Callable[[Any], Any]) -> Callable[..., Any]:
    def build(items: Any = ()) -> Any:
        if not isinstance(items, list | tuple):
            raise TypeError("a list of items is expected")
        return kind(items)

    return build


def _size(items: Any = ()) -> torch.Size:
    return torch.Size(_counts(items))


def _path(kind: type) -> Callable[..., str]:
    def build(*parts: Any) -> str:
        if not all(isinstance(part, str) for part in parts):
            raise TypeError("a path is made of text")
        return str(kind(*parts))

    return build


def _member(kind: Any, name: Any) -> Opaque:
    """`getattr(EnumClass, name)`, as Python 3.11.0 to 3.11.3 and nested classes write an enum member."""
    if not (isinstance(kind, type) and issubclass(kind, Opaque) and isinstance(name, str)):
        raise UnsafePickle("builtins.getattr on something else than a stand-in for an enum")
    return kind(name)


def _reconstruct(kind: Any, base: Any, state: Any = None) -> Opaque:
    if not (isinstance(kind, type) and issubclass(kind, Opaque)):
        raise UnsafePickle("copyreg._reconstructor of something else than a stand-in")
    return kind() if state is None else kind(state)


def _plain_constructors() -> dict[str, Callable[..., Any]]:
    functions: dict[str, Callable[..., Any]] = {
        "builtins.bytearray": _bytearray,
        "builtins.bytes": lambda: b"",  # how protocol 2 writes empty bytes; others are encoded text
        "builtins.complex": lambda real=0.0, imag=0.0: complex(float(real), float(imag)),
        "builtins.set": _from_items(set),
        "builtins.frozenset": _from_items(frozenset),
        "builtins.list": _from_items(list),
        "builtins.tuple": _from_items(tuple),
        "builtins.dict": _from_items(dict),
        "builtins.slice": lambda *args: slice(*args),
        "builtins.range": lambda *args: range(*args),
        "builtins.getattr": _member,
        "copyreg._reconstructor": _reconstruct,
        "_codecs.encode": _encode,
        # The factory is left out: nothing that a pickle names is called later on.
        "collections.defaultdict": lambda factory=None: defaultdict(None),
        "collections.OrderedDict": _from_items(OrderedDict),
        "torch.Size": _size,
        "torch.serialization._get_layout": lambda name: Tag(str(name)),
        "torch._utils._rebuild_tensor": rebuild_tensor,
        "torch._utils._rebuild_tensor_v2": rebuild_tensor,
        "torch._utils._rebuild_tensor_v3": rebuild_tensor_of_bytes,
        "torch._utils._rebuild_parameter": rebuild_parameter,
        "torch._utils._rebuild_parameter_with_state": rebuild_parameter,
        "torch._tensor._rebuild_from_type_v2": rebuild_from_type,
        "numpy.dtype": PickledDtype,
    }
    for core in ("numpy.core", "numpy._core"):
        functions[f"{core}.multiarray._reconstruct"] = _numpy_array
        functions[f"{core}.multiarray.scalar"] = _numpy_scalar
        functions[f"{core}.numeric._frombuffer"] = _numpy_from_buffer
    for module in ("pathlib", "pathlib._local"):
        for name in ("Path", "PosixPath", "PurePath", "PurePosixPath"):
            functions[f"{module}.{name}"] = _path(PurePosixPath)
        for name in ("WindowsPath", "PureWindowsPath"):
            functions[f"{module}.{name}"] = _path(PureWindowsPath)
    return functions


def _tags() -> dict[str, Any]:
    tags: dict[str, Any] = {name: Tag(name) for name in ("torch.Tensor", "torch.nn.parameter.Parameter")}
    tags |= {f"builtins.{kind.__name__}": Tag(kind.__name__) for kind in (int, float, bool, str, object)}
    tags["numpy.ndarray"] = Tag("numpy.ndarray")
    for name in ("contiguous_format", "preserve_format", "channels_last", "channels_last_3d"):
        tags[f"torch.{name}"] = Tag(f"torch.{name}")
    for name in dir(torch):
        value = getattr(torch, name)
        if isinstance(value, torch.dtype):
            tags[f"torch.{name}"] = value
    return tags


def _storages() -> dict[str, Any]:
    kinds = {
        "Double": torch.float64,
        "Float": torch.float32,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
        "ComplexFloat": torch.complex64,
        "ComplexDouble": torch.complex128,
    }
    storages = {f"torch.{place}{kind}Storage": dtype for kind, dtype in kinds.items() for place in ("", "cuda.")}
    tags: dict[str, Any] = {name: Tag(name, dtype) for name, dtype in storages.items()}
    for name in ("torch.UntypedStorage", "torch.storage.UntypedStorage", "torch.storage.TypedStorage"):
        tags[name] = Tag(name, None)
    return tags


HARMLESS: dict[str, Any] = (
    {name: Constructor(name, function) for name, function in _plain_constructors().items()} | _tags() | _storages()
)
"""What a pickle gets for each `module.name`; nothing is looked up in modules."""
