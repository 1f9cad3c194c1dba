"""Progress of a process for the supervisor of its machine: a small file, and stacks on request.

The file `rank_3` is replaced at every step and at every change of phase. The supervisor asks for stacks with SIGUSR2
(Python stacks of all threads, written even when the main thread is stuck in a library) and with a file `dump`
(PyTorch's record of recent collectives, where this build keeps one).
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

DUMP_REQUEST = "dump"
_POLL_SECONDS = 0.5


class Heartbeat:
    """Reports where a process is; without a folder it does nothing.

    Args:
        folder: on this machine, made by the launcher.
        stacks: folder that the stacks are written to when they are asked for.
    """

    def __init__(self, folder: Path | None, stacks: Path | None, rank: int) -> None:
        self.folder = folder
        self.rank = rank
        self.phase = "init"
        self.step = 0
        self.sections: dict[str, float] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            if stacks is not None:
                self._answer_requests(folder, stacks)
            self._write()

    def finish_step(self, step: int) -> None:
        """`step` optimizer steps are done."""
        self.phase, self.step = "step", step
        self._write()

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Report another phase (`checkpoint`, `evaluate`, `close`) inside the block."""
        before, self.phase = self.phase, phase
        self._write()
        yield
        self.phase = before
        self._write()

    def leave(self, finished: bool) -> None:
        """The last step of the run is saved, or the run was stopped and is saved."""
        self.phase = "finished" if finished else "stopped"
        self._write()

    def _write(self) -> None:
        if self.folder is None:
            return
        beat = {"pid": os.getpid(), "phase": self.phase, "step": self.step, "time": time.time()}
        partial = self.folder / f"rank_{self.rank}.partial"
        partial.write_text(json.dumps(beat | {"sections": self.sections}))
        partial.replace(self.folder / f"rank_{self.rank}")

    def _answer_requests(self, folder: Path, stacks: Path) -> None:
        stacks.mkdir(parents=True, exist_ok=True)
        # The file stays open for the life of the process: a signal handler cannot open it.
        file = open(stacks / f"rank_{self.rank}.txt", "a")  # noqa: SIM115
        faulthandler.register(signal.SIGUSR2, file=file, all_threads=True, chain=False)
        target = stacks / f"rank_{self.rank}.collectives"
        watcher = threading.Thread(target=_watch, args=(folder / DUMP_REQUEST, target), name="heartbeat", daemon=True)
        watcher.start()


def _watch(request: Path, target: Path) -> None:
    # A thread, because the main thread of a process that hangs in a collective runs no Python any more.
    while not request.exists():
        time.sleep(_POLL_SECONDS)
    record = _collectives()
    if record is not None:
        target.write_bytes(record())


def _collectives() -> Callable[[], bytes] | None:
    """PyTorch's flight recorder (a pickle for `torchfrtrace`), where this build has one."""
    from torch._C import _distributed_c10d as c10d

    nccl = getattr(c10d, "_dump_nccl_trace", None)
    return nccl if nccl is not None else getattr(c10d, "_dump_fr_trace", None)
