"""`JobSpec`: everything a launcher must know to start the processes of a run on one machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class JobSpec:
    """One world of equal processes that differ in nothing but their rank."""

    module: str
    """Started as `python -m module`."""
    arguments: tuple[str, ...]
    """Given to every process."""
    processes: int
    run_dir: Path
    """Its `logs` folder gets one file per rank."""
    master_addr: str = "127.0.0.1"
    master_port: int = 29500
    threads_per_rank: int = 1
    env: Mapping[str, str] = field(default_factory=dict)
    """Added to the environment of every process; wins over what the launcher sets by itself, except for the ranks."""
    grace_seconds: float = 30.0
    """Time to leave after a signal before a process is killed."""
