"""What the launcher tells a training process about the attempt it belongs to, through the environment."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Attempt:
    """One start of all processes of a run; a process that nobody supervises has empty fields."""

    id: str
    """Unique over all attempts of all runs."""
    fence: Path | None
    """Holds the id of the attempt that may write checkpoints now."""
    beats: Path | None
    """Folder on this machine in which the process reports its progress."""
    stacks: Path | None
    """Folder for the stacks of a process that hangs."""


def attempt_from_environment() -> Attempt:
    """The attempt of this process."""
    env = os.environ
    paths = [Path(value) if (value := env.get(name)) else None for name in ("RB_FENCE", "RB_BEATS", "RB_STACKS")]
    return Attempt(env.get("RB_ATTEMPT", ""), *paths)
