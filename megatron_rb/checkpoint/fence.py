"""Keeps the writers of an earlier attempt of a run from publishing anything once a later attempt has begun."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


class Fenced(RuntimeError):
    """Another attempt of the run owns its checkpoints now."""


@dataclass(frozen=True)
class Fence:
    """The id of an attempt and the file that holds the id of the one that may write.

    The launcher writes a new id before it starts an attempt, and that attempt removes unfinished checkpoints before it
    looks for the newest complete one. A writer that passed `check` before the new id was written therefore either
    publishes before the new attempt looks, or finds that its unfinished checkpoint is gone.
    """

    attempt: str
    file: Path

    def check(self) -> None:
        """Raise `Fenced` unless this attempt is the one that may write."""
        owner = self.file.read_text().strip()
        if owner != self.attempt:
            raise Fenced(
                f"attempt {self.attempt} may not write checkpoints any more: attempt {owner} has taken over this run"
            )
