"""The processes of one machine as their progress files show them: who hangs, who has ended, and asking for stacks."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron_rb.launch.limits import Beat, Limits, RankProgress

DUMP_REQUEST = "dump"


@dataclass(frozen=True)
class Hang:
    """A process without progress."""

    rank: int
    phase: str
    step: int
    seconds: float
    limit: float


class Beats:
    """Watches the progress files of some ranks in a folder.

    Args:
        ranks: of this machine.
    """

    def __init__(self, folder: Path, ranks: Iterable[int], limits: Limits) -> None:
        self.folder = folder
        self.limits = limits
        now = time.monotonic()
        self.progress = {rank: RankProgress(limits, now) for rank in ranks}
        self.exits: dict[int, int] = {}
        """Exit code by rank, of those that have ended."""

    def look(self) -> list[int]:
        """Read all files; returns the ranks that have ended since the last look."""
        now = time.monotonic()
        for rank, progress in self.progress.items():
            beat = _read_beat(self.folder / f"rank_{rank}")
            if beat is not None:
                progress.see(beat, now)
        return [rank for rank in self.progress if rank not in self.exits and self._ended(rank)]

    def hang(self) -> Hang | None:
        """The process that has been silent longest beyond its limit; None when all get on."""
        now = time.monotonic()
        stuck = [
            (progress.silent_seconds(now), rank)
            for rank, progress in self.progress.items()
            if rank not in self.exits and progress.hangs(now)
        ]
        if not stuck:
            return None
        seconds, rank = max(stuck)
        beat = self.progress[rank].beat
        phase = beat.phase if beat is not None else "start"
        return Hang(rank, phase, beat.step if beat else 0, seconds, self.limits.of(phase))

    def pids(self) -> list[int]:
        """Process ids of the ranks that have not ended."""
        alive = (progress.beat for rank, progress in self.progress.items() if rank not in self.exits)
        return [beat.pid for beat in alive if beat is not None]

    def ask_for_stacks(self) -> None:
        """Every rank writes its Python stacks and its record of collectives; one that was stopped goes on for that."""
        (self.folder / DUMP_REQUEST).touch()
        for pid in self.pids():
            for signum in (signal.SIGUSR2, signal.SIGCONT):
                send(pid, signum)

    def send(self, signum: int) -> None:
        """Send a signal to every rank that runs."""
        for pid in self.pids():
            send(pid, signum)

    def _ended(self, rank: int) -> bool:
        file = self.folder / f"exit_{rank}"
        if not file.is_file():
            return False
        self.exits[rank] = int(file.read_text())
        return True


def send(pid: int, signum: int) -> None:
    """Send a signal to a process that may have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signum)


def remove_earlier(run_id: str, keep: Path, attempt_id: str) -> list[int]:
    """Kill what earlier attempts of this run left on this machine and remove their folders.

    Returns:
        The ids of the processes killed. A process counts when its environment names the run and another attempt.
    """
    killed = []
    for folder in keep.parent.glob(f"rb-{run_id}-*"):
        if folder == keep or not folder.name.endswith("-" + keep.name.rsplit("-", 1)[-1]):
            continue
        for file in folder.glob("rank_*"):
            beat = _read_beat(file)
            if beat is not None and _is_of_earlier_attempt(beat.pid, run_id, attempt_id):
                send(beat.pid, signal.SIGKILL)
                killed.append(beat.pid)
        shutil.rmtree(folder, ignore_errors=True)
    return killed


def _is_of_earlier_attempt(pid: int, run_id: str, attempt_id: str) -> bool:
    try:
        words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return f"RB_RUN_ID={run_id}".encode() in words and f"RB_ATTEMPT={attempt_id}".encode() not in words


def _read_beat(file: Path) -> Beat | None:
    try:
        data = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return Beat(data["pid"], data["phase"], data["step"], data["time"], data["sections"])
