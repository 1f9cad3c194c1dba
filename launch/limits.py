"""How long a phase may take before it counts as a hang, learnt from the run itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

STEP_FACTOR, STEP_SLACK = 2.0, 4.0
PHASE_FACTOR, PHASE_SLACK = 3.0, 30.0
"""Times the slowest seen, plus so many seconds. Other phases vary more than steps and are seen less often."""


@dataclass
class Limits:
    """Slowest time seen of each phase, in seconds."""

    unknown: float
    """Limit of a phase that has not been seen yet."""
    slowest: dict[str, float] = field(default_factory=dict)
    least: float = 0.0
    """No learnt limit is shorter."""

    def learn(self, times: Mapping[str, float]) -> None:
        """Take in further times."""
        for phase, seconds in times.items():
            self.slowest[phase] = max(seconds, self.slowest.get(phase, 0.0))

    def of(self, phase: str) -> float:
        """Seconds without a sign of progress after which a process in this phase hangs."""
        if phase not in self.slowest:
            return self.unknown
        if phase == "step":
            return max(self.least, STEP_FACTOR * self.slowest[phase] + STEP_SLACK)
        return max(self.least, PHASE_FACTOR * self.slowest[phase] + PHASE_SLACK)


@dataclass(frozen=True)
class Beat:
    """The newest report of a process."""

    pid: int
    phase: str
    step: int
    time: float
    """Seconds since the epoch, by the clock of its machine."""
    sections: Mapping[str, float] = field(default_factory=dict)


@dataclass
class RankProgress:
    """Follows one process through its reports.

    Args:
        limits: shared by the processes of a machine.
        now: monotonic time, in seconds.
    """

    limits: Limits
    now: float
    beat: Beat | None = None

    def see(self, beat: Beat, now: float) -> None:
        """Take in the report that is there now, which may be the one already known."""
        if beat == self.beat:
            return
        if self.beat is not None:
            steps = beat.step - self.beat.step
            if self.beat.phase == beat.phase == "step" and steps > 0:
                self.limits.learn({"step": (beat.time - self.beat.time) / steps})
            elif self.beat.phase != beat.phase and self.beat.phase != "step":
                self.limits.learn({self.beat.phase: beat.time - self.beat.time})
        self.beat, self.now = beat, now

    def silent_seconds(self, now: float) -> float:
        """Time since the last sign of progress."""
        return now - self.now

    def hangs(self, now: float) -> bool:
        """Whether the process has been silent for longer than its phase may take."""
        return self.silent_seconds(now) > self.limits.of(self.beat.phase if self.beat is not None else "start")
