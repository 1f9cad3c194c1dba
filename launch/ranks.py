"""The ranks of an attempt while it runs, the failure that ends it, and its outcome: for one machine as for many."""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_rb.launch.attempt import AttemptResult
from megatron_rb.launch.beats import Hang
from megatron_rb.launch.failure import Failure, FailureKind, failure_of_exit, failure_of_hang

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""What has a run save and leave."""
BEFORE_STEPS = ("start", "init")
"""Phases of a rank that does not obey these signals yet."""


@dataclass
class RankState:
    """What a supervisor said last about a rank."""

    phase: str = "start"
    """`start` = it has not reported yet."""
    step: int = 0
    sections: Mapping[str, float] = field(default_factory=dict)
    code: int | None = None
    """Exit code; 128 + the signal where it died of one. None = it runs."""


class Ranks:
    """Takes in what is reported of the ranks of an attempt.

    Args:
        node_of: machine of every rank.
        attempt: its number.
    """

    def __init__(self, node_of: Mapping[int, str], attempt: int) -> None:
        self.node_of, self.attempt = node_of, attempt
        self.states = {rank: RankState() for rank in node_of}
        self.failure: Failure | None = None
        self.noticed_at: float | None = None
        """When the first failure was known, in seconds since the epoch."""
        self.first_step_at: float | None = None

    def all_ended(self) -> bool:
        return all(state.code is not None for state in self.states.values())

    def unfinished_nodes(self, nodes: tuple[str, ...]) -> list[str]:
        """Those of the machines on which a rank has not ended."""
        running = {self.node_of[rank] for rank, state in self.states.items() if state.code is None}
        return [node for node in nodes if node in running]

    def move(self, rank: int, phase: str, step: int, sections: Mapping[str, float] | None = None) -> None:
        """A rank has reported where it is."""
        state = self.states[rank]
        if phase == "step" and self.first_step_at is None:
            self.first_step_at = time.time()
        state.phase, state.step = phase, max(step, state.step)
        if sections is not None:
            state.sections = sections

    def end(self, rank: int, code: int) -> None:
        """A rank has ended. Wrong input explains the ranks that broke off because one of them found it."""
        state = self.states[rank]
        state.code = code
        if code:
            failure = failure_of_exit(rank, self.node_of[rank], code, state.phase, state.step)
            known = self.failure
            if known is None or (known.kind, failure.kind) == (FailureKind.RANK, FailureKind.CONFIGURATION):
                self.fail(failure)

    def hang(self, hang: Hang) -> None:
        """A rank makes no progress; what failed before explains it."""
        if self.failure is None:
            self.fail(failure_of_hang(hang, self.node_of[hang.rank], f"stacks/attempt_{self.attempt}"))

    def fail(self, failure: Failure) -> None:
        """The attempt ends by this failure."""
        self.failure = failure
        self.noticed_at = self.noticed_at or time.time()

    def result(self, asked_to_stop: bool, slowest: Mapping[str, float]) -> AttemptResult:
        """How the attempt has ended.

        Args:
            asked_to_stop: what reports nothing (it is no trainer) has finished when it leaves without being asked to.
            slowest: time of each phase, in seconds.
        """
        last_step = max((state.step for state in self.states.values()), default=0)
        phase = self.states[0].phase
        finished = phase == "finished" or phase == "start" and not asked_to_stop
        failure = None if asked_to_stop and self._died_of_the_stop() else self.failure
        outcome = "failed" if failure is not None else "finished" if finished else "stopped"
        noticed_at = self.noticed_at if failure is not None else None
        return AttemptResult(outcome, failure, last_step, self.first_step_at, noticed_at, dict(slowest))

    def _died_of_the_stop(self) -> bool:
        """A rank that cannot save yet dies of the signal, which explains those that break off because of it; one that
        takes too long, or is not to save, is killed."""
        codes = [128 + signum for signum in (*STOP_SIGNALS, signal.SIGKILL)]
        died = any(state.code in codes for state in self.states.values())
        failure = self.failure
        return died and (failure is None or failure.code in codes or failure.phase in BEFORE_STEPS)
