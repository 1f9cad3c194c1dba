"""Attempts on this machine: ranks are children of this process, their output reaches the console at once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from megatron_rb.launch.attempt import AttemptResult
from megatron_rb.launch.beats import Beats
from megatron_rb.launch.command import build_commands
from megatron_rb.launch.failure import Failure, describe_exit, kind_of_exit
from megatron_rb.launch.job import JobSpec
from megatron_rb.launch.limits import Limits
from megatron_rb.launch.local import NODE, free_port, start_ranks
from megatron_rb.launch.loop import Loop
from megatron_rb.launch.plan import AttemptPlan, beats_dir, stacks_dir
from megatron_rb.launch.supervise import Supervisor


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
            grace = self.job.patience.grace
            supervisor = Supervisor(ranks, self.signals, grace, beats, loop.publish, plan.number)
            return _result(supervisor, beats, supervisor.run())
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


def _result(supervisor: Supervisor, beats: Beats, code: int) -> AttemptResult:
    ranks = supervisor.ranks
    if code and ranks.failure is None and not supervisor.received:
        last_step = max(state.step for state in ranks.states.values())
        text = f"{NODE} {describe_exit(code)} after step {last_step}"
        ranks.fail(Failure(kind_of_exit(code), text, code, None, NODE, ranks.states[0].phase))
    return ranks.result(bool(supervisor.received), beats.limits.slowest)
