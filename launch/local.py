"""Processes on this machine: each in a session of its own, each with a log file, none outliving the launcher."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import random
import signal
import socket
import subprocess
import sys
import termios
import threading
import tty
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from megatron_rb.config.child_processes import follow_parent
from megatron_rb.config.open_files import raise_open_files
from megatron_rb.launch.command import RankCommand
from megatron_rb.launch.outer_job import without_ranks

NODE = "localhost"
"""The name of this machine in records and tables."""
FIRST_PORT = 20000
"""The ports below belong to services."""
PORT_DRAWS = 32
"""Tries before a port is taken that outgoing connections may have."""
PORT_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


@dataclass
class RankProcess:
    """A started rank. Signals go to its whole process group: the rank and whatever it started itself."""

    rank: int
    process: subprocess.Popen[bytes]
    log: Path
    log_start: int
    """Size of the log before this start; an earlier run's lines come first."""
    console: threading.Thread | None = None
    """Copies the output to the console (rank 0)."""
    exit_code: int | None = field(default=None, init=False)
    """As `subprocess` has it: negative = died of that signal; None = still running."""

    def poll(self) -> int | None:
        """The exit code once the rank has ended; what its group still runs is killed then."""
        if self.exit_code is None:
            # Looked at without reaping, so that the id of the group cannot belong to anybody else yet.
            ended = os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is not None:
                self._signal_group(signal.SIGKILL)
                self.exit_code = self.process.wait()
                if self.console is not None:
                    self.console.join(timeout=2)
        return self.exit_code

    def send(self, signum: int) -> None:
        if self.exit_code is None:
            self._signal_group(signum)

    def _signal_group(self, signum: int) -> None:
        try:
            os.killpg(self.process.pid, signum)
        except ProcessLookupError:
            return  # ended by itself


def start_ranks(commands: Sequence[RankCommand]) -> list[RankProcess]:
    """Start all processes; must be called from the main thread, whose end is what the processes watch."""
    raise_open_files()
    ranks: list[RankProcess] = []
    outputs: list[tuple[RankProcess, int, BinaryIO]] = []
    try:
        for command in commands:
            command.log.parent.mkdir(parents=True, exist_ok=True)
            log: BinaryIO = open(command.log, "ab")  # noqa: SIM115 - the copying thread closes it
            if command.rank == 0:
                reader, writer = _console_pair()
                ranks.append(_start(command, writer, log.tell()))
                os.close(writer)
                outputs.append((ranks[-1], reader, log))
            else:
                with log:
                    ranks.append(_start(command, log.fileno(), log.tell()))
    except BaseException:
        for rank in ranks:
            rank.send(signal.SIGKILL)
        raise
    for rank, reader, log in outputs:  # threads only after the last fork
        rank.console = threading.Thread(target=_copy, args=(reader, log), daemon=True)
        rank.console.start()
    return ranks


def free_port(address: str) -> int:
    """A TCP port that is free on `address` now, and that the system gives to no outgoing connection meanwhile."""
    draw = random.SystemRandom()
    for port in (*(draw.randrange(FIRST_PORT, _first_outgoing_port()) for _ in range(PORT_DRAWS)), 0):
        try:
            with socket.socket() as probe:
                probe.bind((address, port))
                return int(probe.getsockname()[1])
        except OSError as error:
            failure = error
    raise ValueError(f"cluster.master_addr {address} is not an address of this machine: {failure}") from failure


def _first_outgoing_port() -> int:
    """Of those that the system takes for connections of its own choice."""
    try:
        return max(int(PORT_RANGE.read_text().split()[0]), FIRST_PORT + 1)
    except (OSError, ValueError, IndexError):  # no Linux
        return FIRST_PORT + 1000


def check_port(address: str, port: int) -> None:
    """Raise ValueError when rank 0 could not listen on the port."""
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address, port))
    except OSError as error:
        raise ValueError(
            f"port {port} of {address} is in use ({error.strerror}); choose another cluster.master_port, or 0 for "
            f"a free one"
        ) from error


def _start(command: RankCommand, output: int, log_start: int) -> RankProcess:
    process = subprocess.Popen(
        command.argv,
        env={**without_ranks(os.environ), **command.env},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        start_new_session=True,
        preexec_fn=follow_parent(),
    )
    return RankProcess(command.rank, process, command.log, log_start)


def _console_pair() -> tuple[int, int]:
    """Both ends of rank 0's output: a terminal when the launcher writes to one (progress bars), else a pipe."""
    if not sys.stdout.isatty():
        return os.pipe()
    reader, writer = pty.openpty()
    tty.setraw(writer)  # the real terminal does the line ends
    size = fcntl.ioctl(sys.stdout.fileno(), termios.TIOCGWINSZ, b"\0" * 8)
    fcntl.ioctl(writer, termios.TIOCSWINSZ, size)
    return reader, writer


def _copy(reader: int, log: BinaryIO) -> None:
    console: BinaryIO | None = sys.stdout.buffer
    file: BinaryIO | None = log
    with contextlib.suppress(OSError), log:
        while chunk := _read(reader):
            file = _show(file, chunk)  # a rank whose output nobody takes would stand still
            console = _show(console, chunk)
    os.close(reader)


def _read(reader: int) -> bytes:
    try:
        return os.read(reader, 65536)
    except OSError:  # a terminal whose last writer has gone
        return b""


def _show(console: BinaryIO | None, chunk: bytes) -> BinaryIO | None:
    """Write to a console or log; None from then on when nobody reads it any more (`rb launch | head`), or its disk is
    full."""
    try:
        if console is not None:
            console.write(chunk)
            console.flush()
    except (OSError, ValueError):
        return None
    return console
