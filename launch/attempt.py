"""What is known about an attempt while it runs, and how it ended."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from megatron_rb.launch.plan import AttemptPlan


@dataclass(frozen=True)
class Failure:
    """Why an attempt failed."""

    kind: str
    """`configuration`, `rank`, `hang`, `node` or `start`."""
    text: str
    code: int = 1
    rank: int | None = None
    node: str = ""
    phase: str = ""


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


@dataclass
class RankState:
    """What a supervisor said last about a rank."""

    phase: str = "start"
    step: int = 0
    sections: Mapping[str, float] = field(default_factory=dict)
    code: int | None = None
