"""The supervisor of one machine: reports the progress of its ranks as lines of JSON, sees hangs, ends what is orphaned.

`python -m megatron_rb.launch.agent RUN_DIR NUMBER NODE [COMMAND...]`. Without a command the ranks are started by
somebody else (srun), with one it starts them and takes orders (`stop`, `dump`, `kill`) from its standard input.
It uses the standard library only and must stay small: it runs beside the ranks on every machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_rb.launch.beats import Beats, Hang, remove_earlier
from megatron_rb.launch.job import JobSpec, load_job
from megatron_rb.launch.limits import Limits
from megatron_rb.launch.plan import STOP_FILE, AttemptPlan, beats_dir, load_plan, owner, sign_of_life
from megatron_rb.launch.topology import rank_table

POLL_SECONDS, REPORT_SECONDS, FENCE_SECONDS = 0.1, 0.5, 0.3
LOOP_FACTOR = 2.0
"""Times the silence of a machine, until the process that keeps the run going is taken to be gone."""
GIVE_UP_SECONDS = 10.0
"""After a kill; processes that do not even die then cannot be helped."""


class Agent:
    """Watches the ranks of a machine; `run` returns when they have ended."""

    def __init__(self, job: JobSpec, plan: AttemptPlan, node: str) -> None:
        self.job, self.plan, self.node = job, plan, node
        self.ranks = [place.rank for place in rank_table(job, plan.nodes) if place.node == node]
        folder = beats_dir(job.run_id, plan.number, node)
        folder.mkdir(parents=True, exist_ok=True)
        self.beats = Beats(folder, self.ranks, Limits(job.patience.hang, dict(plan.slowest), job.patience.least))
        self.orders: queue.Queue[str] = queue.Queue()
        self.starter: subprocess.Popen[bytes] | None = None
        self.hang: Hang | None = None
        self.reported_at = self.fenced_at = 0.0
        self.killed_at = float("inf")
        self.loop_sign, self.loop_seen_at, self.rescued = 0, time.monotonic(), False

    def run(self) -> None:
        self._catch_signals()
        killed = remove_earlier(self.job.run_id, self.beats.folder, self.plan.id)
        self._say("hello", ranks=self.ranks, step_id=os.environ.get("SLURM_STEP_ID", ""), killed=killed)
        try:
            while not self._all_ended() and time.monotonic() < self.killed_at + GIVE_UP_SECONDS:
                self._turn()
                time.sleep(POLL_SECONDS)
            if self.starter is None:
                self._wait_for_loop()
        finally:
            self._end_starter()
            shutil.rmtree(self.beats.folder, ignore_errors=True)

    def start(self, command: Sequence[str]) -> None:
        """Start the ranks; whoever gives orders is lost when the standard input ends."""
        threading.Thread(target=self._read_orders, daemon=True).start()
        secrets = json.loads(self.orders.get())
        self.starter = subprocess.Popen(
            command, env={**os.environ, **secrets}, stdin=subprocess.DEVNULL, stdout=sys.stderr, start_new_session=True
        )

    def _turn(self) -> None:
        now = time.monotonic()
        for rank in self.beats.look():
            self._report_exit(rank)
        hang = self.beats.hang()
        if hang is not None and self.hang is None:
            self.hang = hang
            self._say("hang", **hang.__dict__)
        while not self.orders.empty():
            self._obey(self.orders.get())
        if self.starter is not None and self.starter.poll() is not None:
            self._starter_ended(self.starter.returncode)
        if now - self.fenced_at > FENCE_SECONDS:
            self.fenced_at = now
            if owner(self.job.run_dir) != self.plan.id:
                self._obey("kill")  # another attempt owns the run
            if self.starter is None:
                self._look_for_loop(now)
        if now - self.reported_at > REPORT_SECONDS:
            self.reported_at = now
            self._report()

    def _all_ended(self) -> bool:
        return len(self.beats.exits) == len(self.ranks) or self.rescued

    def _wait_for_loop(self) -> None:
        """Leave only when the loop was seen after the last rank has ended: nobody else would see that it is gone."""
        seen = self.loop_seen_at
        while self.loop_seen_at == seen and not self.rescued and self.killed_at == float("inf"):
            self._look_for_loop(time.monotonic())
            time.sleep(POLL_SECONDS)

    def _look_for_loop(self, now: float) -> None:
        """Slurm keeps a job that lost its batch host, and with it the loop: have it queued again from here."""
        try:
            sign = sign_of_life(self.job.run_dir).stat().st_mtime_ns
        except FileNotFoundError:
            return
        if sign != self.loop_sign:
            self.loop_sign, self.loop_seen_at = sign, now
        if now - self.loop_seen_at < LOOP_FACTOR * self.job.patience.silence:
            return
        self.rescued = True
        self._obey("kill")
        claim = self.job.launch_dir / f"rescue_{self.plan.number}"
        job_id = os.environ["SLURM_JOB_ID"]
        with contextlib.suppress(FileExistsError):
            # One machine alone asks Slurm.
            os.close(os.open(claim, os.O_CREAT | os.O_EXCL))
            if (self.job.launch_dir / STOP_FILE).exists() or not _still_runs(job_id):
                return  # its user has ended the job, which ended the loop too
            for words in (["requeue", job_id], ["update", f"JobId={job_id}", f"ExcNodeList={self.plan.loop_node}"]):
                subprocess.run(["scontrol", *words], timeout=30)

    def _report(self) -> None:
        beats = {rank: progress.beat for rank, progress in self.beats.progress.items()}
        ranks = {rank: [b.phase, b.step, b.sections] for rank, b in beats.items() if b is not None}
        self._say("beat", ranks=ranks, slowest=self.beats.limits.slowest)

    def _report_exit(self, rank: int) -> None:
        beat = self.beats.progress[rank].beat
        place = {"phase": beat.phase, "step": beat.step} if beat is not None else {"phase": "start", "step": 0}
        self._say("exit", rank=rank, code=self.beats.exits[rank], **place)
        (self.beats.folder / f"exit_{rank}.seen").touch()

    def _starter_ended(self, code: int) -> None:
        """torchrun may die without its ranks; whatever has not reported by itself has ended with it."""
        self._end_starter()
        for rank in set(self.beats.look()) | (set(self.ranks) - set(self.beats.exits)):
            self.beats.exits.setdefault(rank, code)
            self._report_exit(rank)

    def _obey(self, order: str) -> None:
        if order == "stop":
            self.beats.send(signal.SIGUSR1)
        elif order == "dump":
            self.beats.ask_for_stacks()
        elif order == "kill":
            self.beats.send(signal.SIGKILL)
            self._end_starter()
            self.killed_at = min(self.killed_at, time.monotonic())

    def _end_starter(self) -> None:
        if self.starter is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.starter.pid, signal.SIGKILL)
            self.beats.send(signal.SIGKILL)  # torchrun gives its workers sessions of their own
            self.starter.wait()

    def _read_orders(self) -> None:
        for line in sys.stdin:
            self.orders.put(line.strip())
        self.orders.put("kill")

    def _catch_signals(self) -> None:
        # Slurm gives a signal for the ranks to every process of the step, so to this one as well.
        for signum in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, lambda *_: None)
        signal.signal(signal.SIGUSR2, lambda *_: self.orders.put("dump"))

    def _say(self, kind: str, **values: Any) -> None:
        try:
            print(json.dumps({"kind": kind, "node": self.node, **values}), flush=True)
        except BrokenPipeError:  # nobody listens any more
            self._obey("kill")


def _still_runs(job_id: str) -> bool:
    """False when Slurm says that the job is ending; a controller that does not answer says nothing."""
    command = ["squeue", "-h", "-j", job_id, "-o", "%T"]
    try:
        found = subprocess.run(command, timeout=30, capture_output=True, text=True)
    except subprocess.TimeoutExpired:
        return True
    return found.returncode != 0 or found.stdout.strip() in ("", "RUNNING")


def main(argv: Sequence[str]) -> int:
    run_dir, number, node, *command = argv
    job = load_job(Path(run_dir))
    agent = Agent(job, load_plan(job.run_dir, int(number)), node or socket.gethostname())
    if command:
        agent.start(command)
    agent.run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
