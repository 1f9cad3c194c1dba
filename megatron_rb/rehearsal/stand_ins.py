"""`StandIns`: attributes that are exchanged for the time of a rehearsal and put back after it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any

MISSING = object()


class StandIns:
    """Exchanges attributes; leaving the block puts the old ones back, the last first."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []

    def __enter__(self) -> StandIns:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._undo:
            self._undo.pop()()

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Exchange an attribute of a module or class, or add it."""
        old = vars(owner).get(name, MISSING)
        self.later(partial(delattr, owner, name) if old is MISSING else partial(setattr, owner, name, old))
        setattr(owner, name, value)

    def later(self, undo: Callable[[], object]) -> None:
        """Call this when the block is left."""
        self._undo.append(undo)
