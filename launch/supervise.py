"""Watches a world of processes: the first failure ends it with a clear reason, a signal reaches every rank."""

from __future__ import annotations

import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from megatron_rb.launch.beats import Beats, Hang
from megatron_rb.launch.local import RankProcess

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_POLL_SECONDS, _LOOK_SECONDS, _DUMP_SECONDS = 0.02, 0.5, 1.5
_TAIL_BYTES, _TAIL_LINES, _TRACEBACK_LINES = 65536, 15, 40
_TERMINAL_CODES = re.compile(r"\x1b(\[[0-9;?]*[A-Za-z]|\][^\x07]*\x07|.)")


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Collects SIGTERM, SIGINT and SIGUSR1 in a list instead of acting on them."""
    received: list[int] = []

    def remember(signum: int, _frame: FrameType | None) -> None:
        received.append(signum)

    previous = {signum: signal.signal(signum, remember) for signum in FORWARDED}
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
    """

    def __init__(
        self,
        ranks: Sequence[RankProcess],
        received: list[int],
        grace_seconds: float,
        beats: Beats | None = None,
        publish: Callable[[], None] = lambda: None,
    ) -> None:
        self.ranks = ranks
        self.beats = beats
        self.publish = publish
        self.hang: Hang | None = None
        self.failed_rank: int | None = None
        """The first that failed."""
        self.looked_at = 0.0
        self.received = received
        """Signals sent to the launcher; grows while `run` waits."""
        self.grace_seconds = grace_seconds
        self.stop_signal = 0
        self.failure_code = 0
        self.deadline = float("inf")
        self.handled = 0

    def run(self) -> int:
        try:
            while running := [rank for rank in self.ranks if rank.exit_code is None]:
                self._forward_signals(running)
                for rank in running:
                    if rank.poll():
                        self._on_error(rank)
                self._look_for_hang()
                self._keep_deadline()
                time.sleep(_POLL_SECONDS)
        finally:
            for rank in self.ranks:  # whatever happened above, nobody stays behind
                rank.send(signal.SIGKILL)
                while rank.poll() is None:
                    time.sleep(_POLL_SECONDS)
        if self.failure_code or all(rank.exit_code == 0 for rank in self.ranks):
            return self.failure_code
        return 128 + self.stop_signal

    def _forward_signals(self, running: Sequence[RankProcess]) -> None:
        while self.handled < len(self.received):
            signum = self.received[self.handled]
            self.handled += 1
            if signum == signal.SIGINT and self.stop_signal == signal.SIGINT:
                _say("interrupted twice: killing all ranks")
                self.deadline = 0.0
                continue
            _say(f"{_name(signum)}: passed on to {len(running)} ranks, which have {self.grace_seconds:g} s to leave")
            self.stop_signal = signum
            for rank in running:
                rank.send(signum)
            self._start_clock()

    def _look_for_hang(self) -> None:
        now = time.monotonic()
        if self.beats is None or self.hang is not None or now - self.looked_at < _LOOK_SECONDS:
            return
        self.looked_at = now
        self.beats.look()
        self.publish()
        ended = {rank.rank for rank in self.ranks if rank.exit_code is not None}
        self.beats.exits.update(dict.fromkeys(ended, 0))
        self.hang = self.beats.hang()
        if self.hang is not None:
            hang = self.hang
            _say(
                f"rank {hang.rank} made no progress for {hang.seconds:.0f} s in phase '{hang.phase}' after step "
                f"{hang.step} (limit {hang.limit:.0f} s): writing the stacks of all ranks, then killing them"
            )
            self.beats.ask_for_stacks()
            time.sleep(_DUMP_SECONDS)
            self.failure_code, self.deadline = 124, 0.0

    def _on_error(self, rank: RankProcess) -> None:
        code = rank.exit_code or 0
        told = {code for signum in self.received for code in (-signum, 128 + signum)}
        killed_by_us = self.deadline == 0.0 and code == -signal.SIGKILL
        if self.failure_code or code in told or killed_by_us:
            return  # follows from the first failure, or from what the rank was told
        self.failure_code = code if code > 0 else 128 - code
        self.failed_rank = rank.rank
        _say(f"rank {rank.rank} {describe_exit(code)}; the end of {rank.log}:")
        for line in last_words(rank.log, rank.log_start):
            _say(f"    {line}")
        others = [other for other in self.ranks if other.exit_code is None]
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
        late = [rank for rank in self.ranks if rank.exit_code is None]
        if late and self.deadline:
            _say(f"killing rank {', '.join(str(rank.rank) for rank in late)}: no end after {self.grace_seconds:g} s")
        self.deadline = 0.0
        for rank in late:
            rank.send(signal.SIGKILL)


def describe_exit(code: int) -> str:
    """What an exit code says, in words."""
    if code >= 0:
        return f"failed with exit code {code}"
    hint = " (often: the machine ran out of memory)" if code == -signal.SIGKILL else ""
    return f"was killed by {_name(-code)}{hint}"


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


def _name(signum: int) -> str:
    try:
        return signal.Signals(signum).name
    except ValueError:
        return f"signal {signum}"


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
