"""Watches a world of processes: the first failure ends it with a clear reason, a signal reaches every rank."""

from __future__ import annotations

import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from megatron_rb.config.failures import WRONG_INPUT
from megatron_rb.launch.beats import Beats
from megatron_rb.launch.failure import describe_exit, signal_name
from megatron_rb.launch.local import NODE, RankProcess
from megatron_rb.launch.ranks import STOP_SIGNALS, Ranks, RankState

_POLL_SECONDS, _LOOK_SECONDS, _DUMP_SECONDS = 0.02, 0.5, 1.5
_TAIL_BYTES, _TAIL_LINES, _TRACEBACK_LINES = 65536, 15, 40
_TERMINAL_CODES = re.compile(r"\x1b(\[[0-9;?]*[A-Za-z]|\][^\x07]*\x07|.)")


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Collects SIGTERM, SIGINT and SIGUSR1 in a list instead of acting on them."""
    received: list[int] = []

    def remember(signum: int, _frame: FrameType | None) -> None:
        received.append(signum)

    previous = {signum: signal.signal(signum, remember) for signum in STOP_SIGNALS}
    try:
        yield received
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


class Supervisor:
    """Waits for all ranks; `run` returns 0, the code of the first that failed, or 128 + the signal that ended all.

    Ranks that were told to stop, saved and left with 0 have done what was asked: the answer is 0.

    Args:
        beats: the progress that the ranks report; None = a hang is not looked for.
        publish: called about twice a second.
        attempt: number of the attempt of a run.
    """

    def __init__(
        self,
        processes: Sequence[RankProcess],
        received: list[int],
        grace_seconds: float,
        beats: Beats | None = None,
        publish: Callable[[Mapping[int, RankState]], None] = lambda states: None,
        attempt: int = 0,
    ) -> None:
        self.processes = processes
        self.beats = beats
        self.publish = publish
        self.ranks = Ranks({process.rank: NODE for process in processes}, attempt)
        self.looked_at = 0.0
        self.received = received
        """Signals sent to the launcher; grows while `run` waits."""
        self.grace_seconds = grace_seconds
        self.stop_signal = 0
        self.deadline = float("inf")
        self.handled = 0

    def run(self) -> int:
        try:
            while running := [process for process in self.processes if process.exit_code is None]:
                self._forward_signals(running)
                for process in running:
                    if process.poll():
                        self._on_error(process)
                self._look_for_hang()
                self._keep_deadline()
                time.sleep(_POLL_SECONDS)
        finally:
            for process in self.processes:  # whatever happened above, nobody stays behind
                process.send(signal.SIGKILL)
                while process.poll() is None:
                    time.sleep(_POLL_SECONDS)
        self._read_progress()
        if self.ranks.failure is not None:
            return self.ranks.failure.code
        return 0 if all(process.exit_code == 0 for process in self.processes) else 128 + self.stop_signal

    def _forward_signals(self, running: Sequence[RankProcess]) -> None:
        while self.handled < len(self.received):
            signum = self.received[self.handled]
            self.handled += 1
            if signum == signal.SIGINT and self.stop_signal == signal.SIGINT:
                _say("interrupted twice: killing all ranks")
                self.deadline = 0.0
                continue
            who = f"{len(running)} ranks, which have {self.grace_seconds:g} s to leave"
            _say(f"{signal_name(signum)}: passed on to {who}")
            self.stop_signal = signum
            for process in running:
                process.send(signum)
            self._start_clock()

    def _look_for_hang(self) -> None:
        now = time.monotonic()
        if self.beats is None or now - self.looked_at < _LOOK_SECONDS:
            return
        self.looked_at = now
        self._read_progress()
        self.publish(self.ranks.states)
        ended = {process.rank for process in self.processes if process.exit_code is not None}
        self.beats.exits.update(dict.fromkeys(ended, 0))
        hang = self.beats.hang()
        if hang is not None and self.ranks.failure is None:
            self.ranks.hang(hang)
            self.beats.ask_for_stacks()
            time.sleep(_DUMP_SECONDS)
            assert self.ranks.failure is not None
            _say(f"{self.ranks.failure.text}; killing all ranks")
            self.deadline = 0.0

    def _read_progress(self) -> None:
        if self.beats is None:
            return
        self.beats.look()
        for rank, progress in self.beats.progress.items():
            if progress.beat is not None:
                self.ranks.move(rank, progress.beat.phase, progress.beat.step, progress.beat.sections)

    def _on_error(self, process: RankProcess) -> None:
        code = _shell_code(process.exit_code or 0)
        killed_by_us = self.deadline == 0.0 and code == 128 + signal.SIGKILL
        if killed_by_us or code in [128 + signum for signum in self.received]:
            self.ranks.states[process.rank].code = code
            return  # it has done what it was asked to
        self._read_progress()
        before = self.ranks.failure
        self.ranks.end(process.rank, code)
        if self.ranks.failure is before:
            return  # follows from the first failure
        told = before is None and code == WRONG_INPUT and process.console is not None
        if not told:  # else its one sentence is what the console shows last
            _say(f"rank {process.rank} {describe_exit(code)}; the end of {process.log}:")
            for line in last_words(process.log, process.log_start):
                _say(f"    {line}")
        if before is None:
            self._stop_others()

    def _stop_others(self) -> None:
        others = [process for process in self.processes if process.exit_code is None]
        if others:
            _say(f"stopping {len(others)} other ranks, which have {self.grace_seconds:g} s to leave")
        for other in others:
            other.send(signal.SIGTERM)
        self._start_clock()

    def _start_clock(self) -> None:
        self.deadline = min(self.deadline, time.monotonic() + self.grace_seconds)

    def _keep_deadline(self) -> None:
        if time.monotonic() < self.deadline:
            return
        late = [process for process in self.processes if process.exit_code is None]
        if late and self.deadline:
            ranks = ", ".join(str(process.rank) for process in late)
            _say(f"killing rank {ranks}: no end after {self.grace_seconds:g} s")
        self.deadline = 0.0
        for process in late:
            process.send(signal.SIGKILL)


def last_words(log: Path, start: int) -> list[str]:
    """The last traceback of a log, or its last lines when there is none.

    Args:
        start: bytes at the beginning that belong to an earlier run.
    """
    with open(log, "rb") as file:
        size = file.seek(0, 2)
        file.seek(max(start, size - _TAIL_BYTES))
        text = file.read().decode(errors="replace")
    # A progress bar rewrites its line; the last state counts.
    lines = [line.rstrip().rsplit("\r", 1)[-1] for line in _TERMINAL_CODES.sub("", text).split("\n")]
    lines = [line for line in lines if line.strip()]
    starts = [i for i, line in enumerate(lines) if line.startswith("Traceback (most recent call last)")]
    if starts:
        return lines[starts[-1] :][-_TRACEBACK_LINES:]
    return lines[-_TAIL_LINES:] or ["(the log is empty)"]


def _shell_code(code: int) -> int:
    """The exit code of a process as a shell has it, from that of `subprocess` (negative = died of that signal)."""
    return code if code >= 0 else 128 - code


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
