"""Follows one attempt through the reports of its supervisors until all ranks have ended or it had to be ended."""

from __future__ import annotations

import json
import os
import re
import selectors
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_rb.launch.attempt import AttemptResult, Channel, Failure, RankState, Starter
from megatron_rb.launch.job import JobSpec
from megatron_rb.launch.limits import Limits
from megatron_rb.launch.plan import AttemptPlan, give_up_ownership, owner
from megatron_rb.launch.record import newest_checkpoint
from megatron_rb.launch.step_words import EndedTasks, unreported_end
from megatron_rb.launch.topology import rank_table
from megatron_rb.launch.verdict import class_of_exit

TURN_SECONDS, DUMP_SECONDS, FENCE_SECONDS, END_SECONDS, ASK_AGAIN_SECONDS = 0.1, 1.5, 1.0, 10.0, 2.0
PUBLISH_SECONDS, KILL_SECONDS = 0.5, 1.5
START_SECONDS = 120.0
"""For a machine to report for the first time."""


class AttemptWatch:
    """Waits for an attempt.

    Args:
        signals: those received by this process; grows while `run` waits.
        publish: called about once a second with the state of all ranks.
    """

    def __init__(
        self,
        job: JobSpec,
        plan: AttemptPlan,
        starter: Starter,
        signals: list[int],
        publish: Callable[[Mapping[int, RankState]], None],
    ) -> None:
        self.job, self.plan, self.starter, self.signals, self.publish = job, plan, starter, signals, publish
        self.ranks = {place.rank: RankState() for place in rank_table(job, plan.nodes)}
        self.node_of = {place.rank: place.node for place in rank_table(job, plan.nodes)}
        self.heard: dict[str, float] = {}
        self.limits = Limits(job.patience.hang, dict(plan.slowest), job.patience.least)
        self.words: deque[str] = deque(maxlen=20)
        """What srun or ssh said themselves."""
        self.ended = EndedTasks()
        self.failure: Failure | None = None
        self.first_step_at: float | None = None
        self.noticed_at: float | None = None
        self.asked_at = float("-inf")
        self.end_at = self.failed_at = float("inf")
        self.lost = False
        self.started = time.monotonic()
        self.unfinished: dict[int, bytes] = {}

    def run(self) -> AttemptResult:
        channels = self.starter.start(self.plan)
        with selectors.DefaultSelector() as selector:
            for channel in channels:
                assert channel.process.stdout is not None
                os.set_blocking(channel.process.stdout.fileno(), False)
                selector.register(channel.process.stdout, selectors.EVENT_READ)
            try:
                self._wait(channels, selector)
            finally:
                self._end(channels)
        return self._result()

    def _wait(self, channels: Sequence[Channel], selector: selectors.BaseSelector) -> None:
        slow_at, published_at, was_ended = 0.0, 0.0, False
        while True:
            for key, _ in selector.select(timeout=TURN_SECONDS):
                if not self._read(key.fd):
                    selector.unregister(key.fileobj)
                    self._on_closed(next(c for c in channels if c.process.stdout is key.fileobj), len(channels))
            if all(state.code is not None for state in self.ranks.values()):
                return
            ended = all(channel.process.poll() is not None for channel in channels)
            if ended and (was_ended or not selector.get_map()):
                self._blame_channels(channels)
                return
            was_ended = ended  # one more turn for what is still in the pipe
            now = time.monotonic()
            self._pass_signals(channels)
            self._find_ended_tasks(now)
            self._find_silent_nodes(now)
            if self.failure is not None and self.noticed_at is None:
                self.noticed_at = time.time()
            if now - published_at > PUBLISH_SECONDS:
                published_at = now
                self.publish(self.ranks)
            if now - slow_at > FENCE_SECONDS:
                slow_at = now
                self.lost = owner(self.job.run_dir) != self.plan.id
            if self.failure is not None and self.end_at == float("inf") and self._is_explained(now):
                self._begin_end(channels, now)
            if self.lost or now > self.end_at:
                return

    def _begin_end(self, channels: Sequence[Channel], now: float) -> None:
        """Kill at once, or after the stacks of a hang are written."""
        assert self.failure is not None
        self.end_at = now
        if self.failure.kind == "hang":
            self.starter.order(channels, "dump")
            self.end_at += DUMP_SECONDS

    def _is_explained(self, now: float) -> bool:
        """A rank may fail because the machine of another one is gone: wait until every machine has spoken since."""
        assert self.failure is not None
        if self.failure.kind != "rank":
            return True
        self.failed_at = min(self.failed_at, now)
        unheard = [node for node in self._unfinished_nodes() if self.heard.get(node, self.started) <= self.failed_at]
        silent = [node for node in unheard if now - self.heard.get(node, self.started) > self.job.patience.silence]
        if silent:
            text = f"{silent[0]} has not answered for {self.job.patience.silence:g} s; {self.failure.text}"
            self.failure = Failure("node", text, 1, None, silent[0])
        return not unheard or bool(silent)

    def _unfinished_nodes(self) -> list[str]:
        return [
            node
            for node in self.plan.nodes
            if any(state.code is None for rank, state in self.ranks.items() if self.node_of[rank] == node)
        ]

    def _end(self, channels: Sequence[Channel]) -> None:
        done = all(state.code is not None for state in self.ranks.values())
        if not done and not self.lost:
            give_up_ownership(self.job.run_dir, self.plan)
            self._wait_for_channels(channels, KILL_SECONDS)
        if not done:
            self.starter.order(channels, "kill")
        end = time.monotonic() + END_SECONDS
        # The supervisors leave when they have seen that this process is there to take note of the end.
        while done and time.monotonic() < end and any(channel.process.poll() is None for channel in channels):
            self.publish(self.ranks)
            time.sleep(TURN_SECONDS)
        for channel in channels:
            try:
                channel.process.wait(0.5)
            except subprocess.TimeoutExpired:
                channel.process.kill()
                channel.process.wait()

    def _wait_for_channels(self, channels: Sequence[Channel], seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and any(channel.process.poll() is None for channel in channels):
            time.sleep(TURN_SECONDS)

    def _read(self, descriptor: int) -> bool:
        """Take in what a channel has written; False at its end."""
        try:
            chunk = os.read(descriptor, 1 << 16)
        except BlockingIOError:
            return True
        text = self.unfinished.pop(descriptor, b"") + chunk
        *lines, rest = text.split(b"\n")
        if rest:
            self.unfinished[descriptor] = rest
        for line in lines:
            self._hear(line.decode(errors="replace").strip())
        return bool(chunk)

    def _hear(self, line: str) -> None:
        if not line.startswith('{"kind"'):
            if line:
                self.words.append(line)
                self.ended.hear(line, time.monotonic())
                print(line, flush=True)
            return
        message: dict[str, Any] = json.loads(line)
        self.heard[message["node"]] = time.monotonic()
        if message["kind"] == "beat":
            self.limits.learn(message["slowest"])
            for rank, (phase, step, sections) in message["ranks"].items():
                self._move(int(rank), phase, step)
                self.ranks[int(rank)].sections = sections
        elif message["kind"] == "exit":
            self._move(message["rank"], message["phase"], message["step"])
            self._on_exit(message["rank"], message["code"])
        elif message["kind"] == "hang" and self.failure is None:
            self._on_hang(message)

    def _move(self, rank: int, phase: str, step: int) -> None:
        state = self.ranks[rank]
        if phase == "step" and self.first_step_at is None:
            self.first_step_at = time.time()
        state.phase, state.step = phase, max(step, state.step)

    def _on_exit(self, rank: int, code: int) -> None:
        self.ranks[rank].code = code
        if code == 0:
            return
        kind, node = class_of_exit(code), self.node_of[rank]
        if self.failure is None or (kind == "configuration" and self.failure.kind == "rank"):
            text = f"rank {rank} on {node} {_describe(code)} after step {self.ranks[rank].step}"
            self.failure = Failure(kind, text, code, rank, node, self.ranks[rank].phase)

    def _on_hang(self, message: Mapping[str, Any]) -> None:
        rank, phase = message["rank"], message["phase"]
        text = (
            f"rank {rank} on {message['node']} made no progress for {message['seconds']:.0f} s in phase '{phase}' "
            f"after step {message['step']} (limit {message['limit']:.0f} s); stacks of all ranks are in "
            f"stacks/attempt_{self.plan.number}"
        )
        self.failure = Failure("hang", text, 124, rank, message["node"], phase)

    def _on_closed(self, channel: Channel, channels: int) -> None:
        """The connection to one machine of several has ended; its ranks have not."""
        gone = [node for node in channel.nodes if node in self._unfinished_nodes()]
        if channels > 1 and gone and (self.failure is None or self.failure.kind == "rank"):
            cause = f"; {self.failure.text}" if self.failure is not None else ""
            text = f"the connection to {gone[0]} has ended: {self._last_words()}{cause}"
            self.failure = Failure("node", text, 1, None, gone[0])

    def _find_ended_tasks(self, now: float) -> None:
        if self.failure is None:
            self.failure = unreported_end(
                self.job, self.plan, self.ranks, self.heard, self.ended.told(now), self._last_words(), now
            )

    def _find_silent_nodes(self, now: float) -> None:
        if self.failure is not None:
            return
        for node in self._unfinished_nodes():  # where all ranks have ended the supervisor has ended too
            silent = now - self.heard.get(node, self.started)
            if node in self.heard and silent > self.job.patience.silence:
                self.failure = Failure("node", f"{node} has not answered for {silent:.1f} s", 1, None, node)
            elif node not in self.heard and silent > START_SECONDS:
                text = f"{node} did not start its processes within {START_SECONDS:g} s"
                self.failure = Failure("node", f"{text}: {self._last_words()}", 1, None, node)

    def _pass_signals(self, channels: Sequence[Channel]) -> None:
        now = time.monotonic()
        if self.signals and now - self.asked_at > ASK_AGAIN_SECONDS:
            self.asked_at = now
            self.starter.order(channels, "stop")

    def _blame_channels(self, channels: Sequence[Channel]) -> None:
        """Everything has ended, yet some ranks have not reported."""
        if self.failure is None:
            silent = sorted({self.node_of[rank] for rank, state in self.ranks.items() if state.code is None})
            code = next((channel.process.returncode for channel in channels if channel.process.returncode), 1)
            named = re.search(r"failed on node (\S+?):", "\n".join(self.words))
            if named is not None:
                text = f"nothing can be started on {named[1]}: {self._last_words()}"
                self.failure = Failure("node", text, code, None, named[1])
                return
            text = f"{', '.join(silent)} ended without a report: {self._last_words()}"
            self.failure = Failure("start", text, code)

    def _last_words(self) -> str:
        return "; ".join(list(self.words)[-3:]) or "no message"

    def _result(self) -> AttemptResult:
        last_step = max((state.step for state in self.ranks.values()), default=0)
        outcome = "failed"
        if self.lost:
            outcome = "lost"
        elif self.failure is None:
            outcome = "finished" if self.ranks[0].phase == "finished" else "stopped"
        return AttemptResult(
            outcome, self.failure, last_step, self.first_step_at, self.noticed_at, dict(self.limits.slowest)
        )


def lost_steps(job: JobSpec, last_step: int) -> int:
    """Steps that no checkpoint holds."""
    return max(0, last_step - newest_checkpoint(job.checkpoint_dir))


def _describe(code: int) -> str:
    if code <= 128:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(code - 128).name}"
    except ValueError:
        return f"ended with exit code {code}"
