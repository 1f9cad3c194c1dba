"""Pickles that name classes which this process has not imported."""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Global:
    """A class or function by name."""

    module: str
    name: str


@dataclass(frozen=True, eq=False)
class Instance:
    """An object of a class, made without its constructor, with a state."""

    of: Global
    state: Any


@dataclass(frozen=True)
class CallResult:
    """The result of calling a class or function."""

    of: Global
    args: tuple


_PYTHON_PICKLER: Any = pickle._Pickler  # type: ignore[attr-defined]
"""The one written in Python: the other cannot be taught to write a class by name alone."""


class _ClassPickler(_PYTHON_PICKLER):
    dispatch = dict(_PYTHON_PICKLER.dispatch)

    def save_global_name(self, obj: Global) -> None:
        self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
        self.memoize(obj)

    def save_instance(self, obj: Instance) -> None:
        self.save(obj.of)
        self.save(())
        self.write(pickle.NEWOBJ)
        self.memoize(obj)
        if obj.state is not None:
            self.save(obj.state)
            self.write(pickle.BUILD)

    def save_call(self, obj: CallResult) -> None:
        self.save(obj.of)
        self.save(obj.args)
        self.write(pickle.REDUCE)
        self.memoize(obj)

    dispatch[Global] = save_global_name
    dispatch[Instance] = save_instance
    dispatch[CallResult] = save_call


def dumps(value: Any) -> bytes:
    """The pickle of a tree of plain values, `Global`, `Instance` and `CallResult`, in protocol 2.

    Importing the package of a class only to write its name can take longer than the writing; and only the fields that
    are given are written, so that older releases of the package read them too.
    """
    buffer = io.BytesIO()
    _ClassPickler(buffer, protocol=2).dump(value)
    return buffer.getvalue()
