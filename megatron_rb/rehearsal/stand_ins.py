"""`StandIns`: attributes that are exchanged for the time of a rehearsal and put back after it."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

MISSING = object()


class StandIns:
    """Exchanges attributes; leaving the block puts the old ones back, the last first."""

    def __init__(self) -> None:
        self._old: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> StandIns:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._old:
            owner, name, value = self._old.pop()
            if value is MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, value)

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Exchange an attribute of a module or class, or add it."""
        self._old.append((owner, name, vars(owner).get(name, MISSING)))
        setattr(owner, name, value)

    def set_everywhere(self, owner: Any, name: str, value: Any, packages: tuple[str, ...]) -> None:
        """Exchange a function also where modules of these packages have imported it by name."""
        old = getattr(owner, name)
        self.set(owner, name, value)
        for module in [module for key, module in sys.modules.items() if key.startswith(packages)]:
            for alias in [alias for alias, entry in vars(module).items() if entry is old]:
                self.set(module, alias, value)
