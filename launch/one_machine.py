"""Attempts on this machine: ranks are children of this process, their output reaches the console at once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from megatron_rb.launch.attempt import AttemptResult, Failure, RankState
from megatron_rb.launch.beats import Beats
from megatron_rb.launch.command import build_commands
from megatron_rb.launch.job import JobSpec
from megatron_rb.launch.limits import Limits
from megatron_rb.launch.local import free_port, start_ranks
from megatron_rb.launch.loop import Loop
from megatron_rb.launch.plan import AttemptPlan, beats_dir, stacks_dir
from megatron_rb.launch.supervise import Supervisor
from megatron_rb.launch.verdict import class_of_exit

NODE = "localhost"


class LocalEngine:
    """Starts the ranks of a run on this machine."""

    def __init__(self, job: JobSpec, signals: list[int]) -> None:
        self.job, self.signals = job, signals

    def machines(self) -> list[str]:
        return [NODE]

    def answering(self, nodes: Sequence[str]) -> list[str]:
        return list(nodes)

    def place_for_rank_zero(self, node: str, attempt: int) -> tuple[str, int]:
        address = self.job.master_addr or "127.0.0.1"
        return address, self.job.master_port or free_port(address)

    def queue_again(self, without: Sequence[str]) -> bool:
        return False

    def run_attempt(self, plan: AttemptPlan, loop: Loop) -> AttemptResult:
        folder = beats_dir(self.job.run_id, plan.number, NODE)
        folder.mkdir(parents=True, exist_ok=True)
        limits = Limits(self.job.patience.hang, dict(plan.slowest), self.job.patience.least)
        beats = Beats(folder, range(self.job.processes), limits)
        try:
            ranks = start_ranks(build_commands(self.job, self.job.python, self._environment(plan, folder)))
            supervisor = Supervisor(ranks, self.signals, self.job.patience.grace, beats, lambda: _publish(beats, loop))
            code = supervisor.run()
            beats.look()
            return _result(supervisor, beats, code)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _environment(self, plan: AttemptPlan, folder: Path) -> dict[str, str]:
        known = {name: os.environ[name] for name in self.job.secrets if name in os.environ}
        return known | {
            "MASTER_ADDR": plan.master_addr,
            "MASTER_PORT": str(plan.master_port),
            "RB_RUN_ID": self.job.run_id,
            "RB_FENCE": str(self.job.launch_dir / "attempt"),
            "RB_ATTEMPT": plan.id,
            "RB_BEATS": str(folder),
            "RB_STACKS": str(stacks_dir(self.job.run_dir, plan.number)),
        }


def _publish(beats: Beats, loop: Loop) -> None:
    known = {rank: progress.beat for rank, progress in beats.progress.items()}
    loop.publish({rank: RankState(b.phase, b.step, b.sections) for rank, b in known.items() if b is not None})


def _result(supervisor: Supervisor, beats: Beats, code: int) -> AttemptResult:
    seen = {rank: progress.beat for rank, progress in beats.progress.items()}
    last_step = max((beat.step for beat in seen.values() if beat is not None), default=0)
    failure = None
    if supervisor.hang is not None:
        hang = supervisor.hang
        text = f"rank {hang.rank} made no progress for {hang.seconds:.0f} s in phase '{hang.phase}'"
        failure = Failure("hang", f"{text} after step {hang.step}", 124, hang.rank, NODE, hang.phase)
    elif code:
        rank = supervisor.failed_rank
        beat = seen.get(rank) if rank is not None else None
        phase = beat.phase if beat is not None else "start"
        text = f"rank {rank} ended with code {code}" if rank is not None else f"ended with code {code}"
        failure = Failure(class_of_exit(code), f"{text} after step {last_step}", code, rank, NODE, phase)
    first = seen.get(0)
    # Without a report (a program that is no trainer) a world that leaves without being asked to has finished.
    finished = first.phase == "finished" if first is not None else not supervisor.received
    outcome = "failed" if failure is not None else "finished" if finished else "stopped"
    return AttemptResult(outcome, failure, last_step, slowest=dict(beats.limits.slowest))
