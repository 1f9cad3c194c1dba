"""Carries a run on: one attempt after the other until it has finished, was stopped, or cannot go on."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import time
from collections.abc import Mapping, Sequence
from typing import Protocol

from megatron_rb.config.failures import EX_IOERR, sentence, without_room
from megatron_rb.launch.attempt import AttemptResult
from megatron_rb.launch.failure import FailureKind
from megatron_rb.launch.handed_on import check_secrets
from megatron_rb.launch.job import JobSpec, write_whole
from megatron_rb.launch.plan import STOP_FILE, AttemptPlan, fence_file, owner, sign_of_life
from megatron_rb.launch.ranks import RankState
from megatron_rb.launch.record import (
    COMPLETED,
    FAILED,
    QUEUED,
    RUNNING,
    STOPPED,
    AttemptNote,
    RunRecord,
    effective_time_ratio,
    load_record,
    newest_checkpoint,
    now,
    read_steps,
    running_seconds,
)
from megatron_rb.launch.verdict import judge, kept
from megatron_rb.launch.watch import lost_steps


class Engine(Protocol):
    """Where attempts run."""

    def machines(self) -> list[str]:
        """All machines that are held, in the order in which they should be used."""
        ...

    def answering(self, nodes: Sequence[str]) -> list[str]:
        """Those of the nodes on which something can be started now."""
        ...

    def place_for_rank_zero(self, node: str, attempt: int) -> tuple[str, int]:
        """Address and port at which rank 0 on `node` meets the others."""
        ...

    def run_attempt(self, plan: AttemptPlan, loop: Loop) -> AttemptResult:
        """Start all ranks and wait for their end."""
        ...

    def queue_again(self, without: Sequence[str]) -> bool:
        """Ask for other machines and be started again there; False = this engine cannot."""
        ...


class Loop:
    """Runs attempts; `run` returns the exit code of the job."""

    def __init__(self, job: JobSpec, engine: Engine, signals: list[int], job_id: str) -> None:
        self.job, self.engine, self.signals = job, engine, signals
        self.record = load_record(job.run_dir) or RunRecord(job.run_id, job.name, job.engine, created=now())
        self.record.job_id = job_id
        self.job_id = job_id
        self.bad: set[str] = set(self.record.bad_nodes)
        self.without_room = False
        """The disk was full when the states of the ranks should have been published."""
        self.held = f"{job.run_id}/starting-{os.getpid()}-{secrets.token_hex(3)}"
        """Id by which this process owns the run."""

    def run(self) -> int:
        self._close_orphaned_attempt()
        try:
            check_secrets(self.job.secrets, os.environ, "in this job (`sbatch --export` or SBATCH_EXPORT kept it back)")
        except ValueError as error:
            return self._end(FAILED, str(error), 2)
        while True:
            if self.signals:
                return self._stopped()
            nodes = self._find_nodes()
            if len(nodes) < self.job.nodes:
                return self._without_enough_nodes(nodes)
            result = self._attempt(nodes)
            if result.outcome == "lost":
                self.say(f"another attempt ({owner(self.job.run_dir)}) has taken over the run; this one leaves")
                return 1
            if result.outcome == "finished":
                return self._end(COMPLETED, "", 0)
            if result.outcome == "stopped":
                return self._stopped()
            verdict = judge(self.record.attempts[self.record.launched_at :], self.job.max_retries)
            if not verdict.retry:
                assert result.failure is not None
                return self._end(FAILED, verdict.reason, result.failure.code)
            if self.signals:
                return self._stopped()
            self._exclude(verdict.exclude)
            self.say(f"{verdict.reason}; starting again from step {newest_checkpoint(self.job.checkpoint_dir)}")

    def cannot_write(self, error: OSError) -> int:
        """End a run whose folder has no room for what the launcher must write down; the exit code."""
        if self.record.attempts and self.record.attempts[-1].ended is None:
            note = self.record.attempts[-1]
            note.ended, note.outcome, note.kind, note.cause = now(), "failed", FailureKind.START, sentence(error)
        return self._end(FAILED, sentence(error), EX_IOERR)

    def say(self, text: str) -> None:
        """One line in the log of the launcher, which may lie on a full disk."""
        with contextlib.suppress(OSError):
            print(f"{time.strftime('%H:%M:%S')}  {self.job.run_id}: {text}", flush=True)

    def publish(self, ranks: Mapping[int, RankState]) -> None:
        """Write where every rank is, for `rb launch action=status`."""
        states = {rank: [state.phase, state.step, dict(state.sections)] for rank, state in ranks.items()}
        text = json.dumps({"time": now(), "attempt": len(self.record.attempts), "ranks": states})
        try:
            write_whole(sign_of_life(self.job.run_dir), text)
        except OSError as error:
            if without_room(error) is None:
                raise
            if not self.without_room:  # the ranks may still come to their end
                self.say(sentence(error))
            self.without_room = True

    def _find_nodes(self) -> list[str]:
        held = self.engine.machines()
        good = [node for node in held if node not in self.bad]
        if len(good) >= self.job.nodes:
            return good[: self.job.nodes]
        self.say(f"{len(good)} of {self.job.nodes} nodes are left; asking {', '.join(sorted(self.bad & set(held)))}")
        end = time.monotonic() + self.job.patience.comeback
        while len(good) < self.job.nodes and time.monotonic() < end and not self.signals:
            back = self.engine.answering([node for node in held if node in self.bad])
            if back:
                self.say(f"{', '.join(back)} answers again")
            self.bad -= set(back)
            good = [node for node in held if node not in self.bad]
            time.sleep(0.5 if len(good) < self.job.nodes else 0)
        self.record.bad_nodes = sorted(self.bad)
        return good[: self.job.nodes]

    def _without_enough_nodes(self, nodes: Sequence[str]) -> int:
        gone = ", ".join(sorted(self.bad))
        self.record.state, self.record.reason = QUEUED, f"queued again without {gone}"
        self._save()
        if not self.signals and self.engine.queue_again(sorted(self.bad)):
            return 0
        reason = f"{len(nodes)} of {self.job.nodes} nodes are left ({gone} lost), and no spare"
        return self._end(FAILED, reason, 1)

    def _attempt(self, nodes: Sequence[str]) -> AttemptResult:
        number = len(self.record.attempts) + 1
        address, port = self.engine.place_for_rank_zero(nodes[0], number)
        attempt_id = f"{self.job.run_id}/{number}-{secrets.token_hex(3)}"
        here = os.environ.get("SLURMD_NODENAME", "")
        plan = AttemptPlan(number, attempt_id, tuple(nodes), address, port, dict(self.record.slowest), here)
        note = AttemptNote(number, plan.id, list(nodes), now(), newest_checkpoint(self.job.checkpoint_dir), self.job_id)
        self.record.attempts.append(note)
        self.record.state, self.record.reason = RUNNING, ""
        plan.save(self.job.run_dir)
        self.held = plan.id
        self._save()
        self.say(f"attempt {number} on {', '.join(nodes)}, from step {note.resumed_from}")
        result = self.engine.run_attempt(plan, self)
        if result.outcome != "lost":
            self._note_end(note, result)
        return result

    def _note_end(self, note: AttemptNote, result: AttemptResult) -> None:
        note.ended, note.outcome, note.last_step = now(), result.outcome, result.last_step
        note.first_step_at, note.noticed_at = result.first_step_at, result.noticed_at
        note.lost_steps = lost_steps(self.job, result.last_step)
        if result.failure is not None:
            failure = result.failure
            note.kind, note.cause, note.exit_code = failure.kind, failure.text, failure.code
            note.rank, note.node, note.phase = failure.rank, failure.node, failure.phase
        self.record.slowest = {**self.record.slowest, **result.slowest}
        self._measure()
        self._save()

    def _measure(self) -> None:
        seconds = [entry["seconds"] for entry in read_steps(self.job.run_dir)]
        self.record.ettr = effective_time_ratio(seconds, running_seconds(self.record.attempts, now()))

    def _exclude(self, node: str) -> None:
        if not node:
            return
        self.bad.add(node)
        self.record.bad_nodes = sorted(self.bad)

    def _stopped(self) -> int:
        last = self.record.attempts[-1] if self.record.attempts else None
        saved = kept(newest_checkpoint(self.job.checkpoint_dir), last.last_step if last is not None else 0)
        if last is not None and last.cause:
            saved = f"{saved}; {last.cause}"
        asked = self.job.launch_dir / STOP_FILE
        if asked.exists() or not self.engine_is_warned():
            return self._end(STOPPED, f"stopped by the user; {saved}", 0)
        self.record.state, self.record.reason = QUEUED, f"queued again at the time limit; {saved}"
        self._save()
        if self.engine.queue_again([]):
            return 0
        return self._end(STOPPED, f"stopped by a signal; {saved}", 0)

    def engine_is_warned(self) -> bool:
        """Whether the stop came from a scheduler that will take the machines away (SIGUSR1)."""
        return signal.SIGUSR1 in self.signals and self.job.engine == "slurm"

    def _end(self, state: str, reason: str, code: int) -> int:
        self.record.state, self.record.reason, self.record.exit_code = state, reason, code
        self.record.ended = now()
        self._save()
        self.say(f"{state}{': ' + reason if reason else ''}")
        return code

    def _save(self) -> None:
        if not owner(self.job.run_dir).startswith(self.held):  # it belongs to a later attempt now
            return
        try:
            self.record.save(self.job.run_dir)
        except OSError as error:
            if without_room(error) is None:
                raise
            self._save_in_place_of_states(error)

    def _save_in_place_of_states(self, error: OSError) -> None:
        """On a full disk the record takes the room of the file that says where the ranks are."""
        sign_of_life(self.job.run_dir).unlink(missing_ok=True)
        try:
            self.record.save(self.job.run_dir)
        except OSError:
            self.say(sentence(error))

    def _close_orphaned_attempt(self) -> None:
        """An attempt without an end died with the machine of its loop, or with its Slurm job."""
        (self.job.launch_dir / STOP_FILE).unlink(missing_ok=True)
        write_whole(fence_file(self.job.run_dir), self.held)
        if self.record.attempts and self.record.attempts[-1].ended is None:
            note = self.record.attempts[-1]
            steps = read_steps(self.job.run_dir, last=5)
            note.ended, note.outcome, note.kind = now(), "failed", FailureKind.NODE
            note.last_step = max((entry["step"] for entry in steps), default=note.resumed_from)
            note.lost_steps = lost_steps(self.job, note.last_step)
            note.cause = "the machine of the batch script was lost, or its job was ended from outside"
        self.record.ended = self.record.exit_code = None
