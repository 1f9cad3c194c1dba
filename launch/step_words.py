"""What `srun` itself says about the tasks of a step: it names one that fails at once, long before the step ends."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from megatron_rb.launch.failure import Failure, FailureKind
from megatron_rb.launch.job import JobSpec
from megatron_rb.launch.plan import AttemptPlan
from megatron_rb.launch.ranks import RankState

SETTLE_SECONDS = 0.5
"""From srun's word about a task until it counts: what others say meanwhile belongs to the cause."""
_ENDED = re.compile(r"srun: error: \S+: tasks? (\d[\d,-]*): (.+)")
_EXIT_CODE = re.compile(r"Exited with exit code (\d+)")


@dataclass(frozen=True)
class EndedTask:
    """A task that failed, in srun's words."""

    words: str
    at: float
    """Monotonic time at which srun said so."""

    @property
    def code(self) -> int:
        """Its exit code; 1 where srun tells a signal or a limit instead."""
        found = _EXIT_CODE.search(self.words)
        return int(found[1]) if found else 1


@dataclass
class EndedTasks:
    """Tasks of a step that have failed, by number."""

    tasks: dict[int, EndedTask] = field(default_factory=dict)

    def read(self, line: str, now: float) -> None:
        """Take in a line of srun; others are of no concern."""
        found = _ENDED.match(line)
        if found is not None:
            for number in _numbers(found[1]):
                self.tasks.setdefault(number, EndedTask(found[2], now))

    def settled(self, now: float) -> dict[int, EndedTask]:
        """Those that count by now."""
        return {number: task for number, task in self.tasks.items() if now - task.at > SETTLE_SECONDS}


def unreported_end(
    job: JobSpec,
    plan: AttemptPlan,
    ranks: Mapping[int, RankState],
    reported: Collection[str],
    ended: Mapping[int, EndedTask],
    last_words: str,
    now: float,
) -> Failure | None:
    """The failure behind tasks that have ended without a supervisor's word; None = there is none.

    Args:
        reported: machines whose supervisor has reported.
        last_words: of srun and what it started.
    """
    per_node = job.processes if job.launcher == "srun" else 1
    # The first task of a machine starts its supervisor and waits for it.
    unstarted = [node for index, node in enumerate(plan.nodes) if index * per_node in ended and node not in reported]
    if unstarted and len(unstarted) == len(plan.nodes):
        return Failure(FailureKind.START, f"no machine could start its processes: {last_words}")
    if unstarted:
        return Failure(
            FailureKind.NODE, f"{unstarted[0]} could not start its processes: {last_words}", 1, None, unstarted[0]
        )
    width = job.processes // per_node
    for number, task in ended.items():
        lost = [
            rank for rank in range(number * width, (number + 1) * width) if rank in ranks and ranks[rank].code is None
        ]
        if lost and now - task.at > job.patience.silence:
            node = plan.nodes[lost[0] // job.processes]
            text = f"rank {lost[0]} on {node} has ended without a report; srun: {task.words}"
            return Failure(FailureKind.RANK, text, task.code, lost[0], node, ranks[lost[0]].phase)
    return None


def _numbers(text: str) -> list[int]:
    """`0,2-4` as numbers."""
    found: list[int] = []
    for part in text.strip(",").split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found
