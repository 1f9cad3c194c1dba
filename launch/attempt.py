"""How an attempt ended, and what an engine does for one."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from megatron_rb.launch.failure import Failure
from megatron_rb.launch.plan import AttemptPlan


@dataclass(frozen=True)
class AttemptResult:
    """How an attempt ended."""

    outcome: str
    """`finished`, `stopped` or `failed`; `lost` = another attempt has taken over the run."""
    failure: Failure | None = None
    last_step: int = 0
    first_step_at: float | None = None
    noticed_at: float | None = None
    """When the failure was known, in seconds since the epoch; ending what was left of the attempt came after."""
    slowest: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Channel:
    """A program through which supervisors of some machines report (srun, or one ssh)."""

    process: subprocess.Popen[bytes]
    nodes: tuple[str, ...]


class Starter(Protocol):
    """What an engine does for an attempt."""

    def start(self, plan: AttemptPlan) -> Sequence[Channel]:
        """Start supervisors and ranks on all machines of the plan."""
        ...

    def order(self, channels: Sequence[Channel], word: str) -> None:
        """Pass `stop`, `dump` or `kill` on to all machines."""
        ...
