"""`rb` in a fork of a process that has imported everything; the ranks that it launches are forks of it in turn.

`python -m tests.distributed.launched WORD …` is `rb WORD …`. A rank is what `launch.local` starts otherwise: a child of
the launcher, in a session of its own, with its own environment and streams, and no other file.
"""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from megatron_rb import cli
from megatron_rb.launch import local
from megatron_rb.launch.command import RankCommand
from megatron_rb.launch.local import RankProcess
from megatron_rb.launch.outer_job import without_ranks
from tests.distributed.fork_server import Request, run
from tests.distributed.forked import ForkedProcess, environment_of_tests, start_forked

LAUNCHED = "tests.distributed.launched"
"""This module, for `run_forked`."""


class Launched:
    """A started `rb`; the part of subprocess.Popen that tests use."""

    def __init__(self, words: Sequence[str], folder: Path) -> None:
        self._output = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        with open(os.devnull, "rb") as nothing:
            streams = (nothing.fileno(), self._output.fileno(), self._output.fileno())
            self._process: ForkedProcess = start_forked(LAUNCHED, words, folder, environment_of_tests(), streams)
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.returncode

    def poll(self) -> int | None:
        return self._process.poll()

    def communicate(self, timeout: float) -> tuple[str, None]:
        """All that it has printed, once it has ended. Raises subprocess.TimeoutExpired."""
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise
        self._output.seek(0)
        return self._output.read(), None


class ForkedRank:
    """The part of subprocess.Popen that `RankProcess` uses."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def fork_rank(command: RankCommand, output: int, log_start: int) -> RankProcess:
    """In place of `local._start`."""
    assert command.argv[1] == "-m" and threading.active_count() == 1, command.argv
    environment = {**without_ranks(os.environ), **command.env}
    request = Request(command.argv[2], list(command.argv[3:]), os.getcwd(), environment)
    follow = local.follow_parent()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            follow()
            _leave_launcher(output)
            Path("/proc/self/comm").write_text(f"rank {command.rank}")
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        _run_to_the_end(request)
    return RankProcess(command.rank, ForkedRank(pid), command.log, log_start)


def _leave_launcher(output: int) -> None:
    """Streams of its own, no other file, signals as a new process has them, and no temporary folder to take away."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, file in enumerate((nothing, output, output)):
        os.dup2(file, number)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    for finalizer in list(weakref.finalize._registry):
        finalizer.atexit = False
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)) and number != signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _run_to_the_end(request: Request) -> NoReturn:
    """As an interpreter does; what the launcher has on its stack must not be gone through."""
    code: object = 0
    try:
        run(request)
    except SystemExit as left:
        code = left.code
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


if __name__ == "__main__":
    local._start = fork_rank
    sys.exit(cli.main(sys.argv[1:]))
