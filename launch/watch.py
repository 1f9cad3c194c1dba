"""Follows one attempt through the reports of its supervisors until all ranks have ended or it had to be ended."""

from __future__ import annotations

import json
import os
import re
import selectors
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from megatron_rb.launch.attempt import AttemptResult, Channel, Starter
from megatron_rb.launch.beats import Hang
from megatron_rb.launch.failure import Failure, FailureKind
from megatron_rb.launch.job import JobSpec
from megatron_rb.launch.limits import Limits
from megatron_rb.launch.plan import AttemptPlan, give_up_ownership, owner
from megatron_rb.launch.ranks import Ranks, RankState
from megatron_rb.launch.record import newest_checkpoint
from megatron_rb.launch.step_words import EndedTasks, unreported_end
from megatron_rb.launch.topology import rank_table

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
        self.ranks = Ranks({place.rank: place.node for place in rank_table(job, plan.nodes)}, plan.number)
        self.reported_at: dict[str, float] = {}
        """Last report of each machine, in monotonic seconds."""
        self.limits = Limits(job.patience.hang, dict(plan.slowest), job.patience.least)
        self.words: deque[str] = deque(maxlen=20)
        """What srun or ssh said themselves."""
        self.ended = EndedTasks()
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
            if self.ranks.all_ended():
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
            if now - published_at > PUBLISH_SECONDS:
                published_at = now
                self.publish(self.ranks.states)
            if now - slow_at > FENCE_SECONDS:
                slow_at = now
                self.lost = owner(self.job.run_dir) != self.plan.id
            if self.ranks.failure is not None and self.end_at == float("inf") and self._is_explained(now):
                self._begin_end(channels, now)
            if self.lost or now > self.end_at:
                return

    def _begin_end(self, channels: Sequence[Channel], now: float) -> None:
        """Kill at once, or after the stacks of a hang are written."""
        assert self.ranks.failure is not None
        self.end_at = now
        if self.ranks.failure.kind is FailureKind.HANG:
            self.starter.order(channels, "dump")
            self.end_at += DUMP_SECONDS

    def _is_explained(self, now: float) -> bool:
        """A rank may fail because the machine of another one is gone: wait until every machine has reported since."""
        failure = self.ranks.failure
        assert failure is not None
        if failure.kind is not FailureKind.RANK:
            return True
        self.failed_at = min(self.failed_at, now)
        awaited = [node for node in self._unfinished_nodes() if self._last_report(node) <= self.failed_at]
        silent = [node for node in awaited if now - self._last_report(node) > self.job.patience.silence]
        if silent:
            text = f"{silent[0]} has not answered for {self.job.patience.silence:g} s; {failure.text}"
            self._fail_by_node(silent[0], text)
        return not awaited or bool(silent)

    def _unfinished_nodes(self) -> list[str]:
        return self.ranks.unfinished_nodes(self.plan.nodes)

    def _last_report(self, node: str) -> float:
        return self.reported_at.get(node, self.started)

    def _fail_by_node(self, node: str, text: str, code: int = 1) -> None:
        self.ranks.fail(Failure(FailureKind.NODE, text, code, None, node))

    def _end(self, channels: Sequence[Channel]) -> None:
        done = self.ranks.all_ended()
        if not done and not self.lost:
            give_up_ownership(self.job.run_dir, self.plan)
            self._wait_for_channels(channels, KILL_SECONDS)
        if not done:
            self.starter.order(channels, "kill")
        end = time.monotonic() + END_SECONDS
        # The supervisors leave when they have seen that this process is there to take note of the end.
        while done and time.monotonic() < end and any(channel.process.poll() is None for channel in channels):
            self.publish(self.ranks.states)
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
            self._take_in(line.decode(errors="replace").strip())
        return bool(chunk)

    def _take_in(self, line: str) -> None:
        if not line.startswith('{"kind"'):
            if line:
                self.words.append(line)
                self.ended.read(line, time.monotonic())
                print(line, flush=True)
            return
        message: dict[str, Any] = json.loads(line)
        self.reported_at[message["node"]] = time.monotonic()
        if message["kind"] == "beat":
            self.limits.learn(message["slowest"])
            for rank, (phase, step, sections) in message["ranks"].items():
                self.ranks.move(int(rank), phase, step, sections)
        elif message["kind"] == "exit":
            self.ranks.move(message["rank"], message["phase"], message["step"])
            self.ranks.end(message["rank"], message["code"])
        elif message["kind"] == "hang":
            self.ranks.hang(Hang(**{name: message[name] for name in Hang.__dataclass_fields__}))

    def _on_closed(self, channel: Channel, channels: int) -> None:
        """The connection to one machine of several has ended; its ranks have not."""
        failure = self.ranks.failure
        gone = [node for node in channel.nodes if node in self._unfinished_nodes()]
        if channels > 1 and gone and (failure is None or failure.kind is FailureKind.RANK):
            cause = f"; {failure.text}" if failure is not None else ""
            self._fail_by_node(gone[0], f"the connection to {gone[0]} has ended: {self._last_words()}{cause}")

    def _find_ended_tasks(self, now: float) -> None:
        if self.ranks.failure is not None:
            return
        states, ended = self.ranks.states, self.ended.settled(now)
        failure = unreported_end(self.job, self.plan, states, self.reported_at, ended, self._last_words(), now)
        if failure is not None:
            self.ranks.fail(failure)

    def _find_silent_nodes(self, now: float) -> None:
        if self.ranks.failure is not None:
            return
        for node in self._unfinished_nodes():  # where all ranks have ended the supervisor has ended too
            silent = now - self._last_report(node)
            if node in self.reported_at and silent > self.job.patience.silence:
                self._fail_by_node(node, f"{node} has not answered for {silent:.1f} s")
            elif node not in self.reported_at and silent > START_SECONDS:
                text = f"{node} did not start its processes within {START_SECONDS:g} s"
                self._fail_by_node(node, f"{text}: {self._last_words()}")

    def _pass_signals(self, channels: Sequence[Channel]) -> None:
        now = time.monotonic()
        if self.signals and now - self.asked_at > ASK_AGAIN_SECONDS:
            self.asked_at = now
            self.starter.order(channels, "stop")

    def _blame_channels(self, channels: Sequence[Channel]) -> None:
        """Everything has ended, yet some ranks have not reported."""
        if self.ranks.failure is not None:
            return
        code = next((channel.process.returncode for channel in channels if channel.process.returncode), 1)
        named = re.search(r"failed on node (\S+?):", "\n".join(self.words))
        if named is not None:
            self._fail_by_node(named[1], f"nothing can be started on {named[1]}: {self._last_words()}", code)
            return
        silent = sorted(self._unfinished_nodes())
        text = f"{', '.join(silent)} ended without a report: {self._last_words()}"
        self.ranks.fail(Failure(FailureKind.START, text, code))

    def _last_words(self) -> str:
        return "; ".join(list(self.words)[-3:]) or "no message"

    def _result(self) -> AttemptResult:
        result = self.ranks.result(bool(self.signals), self.limits.slowest)
        return replace(result, outcome="lost") if self.lost else result


def lost_steps(job: JobSpec, last_step: int) -> int:
    """Steps that no checkpoint holds."""
    return max(0, last_step - newest_checkpoint(job.checkpoint_dir))
