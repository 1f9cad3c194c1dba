"""Starts processes that have torch, megatron-core and the package in them from their first moment (fork_server.py)."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = ("tests.distributed.fork_server:preload_package",)
"""What a server calls for its imports, when nothing else is asked for."""
START_SECONDS = 180.0
"""The imports take 10 s on two quiet cores."""
MESSAGE_BYTES = 1 << 18
"""More than the kernel takes as one message by default."""
READ_LATE = frozenset(
    {
        *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME"),
        *("COLUMNS", "MEGATRON_RB_PLATFORM", "PYTHONHASHSEED", "PYTEST_CURRENT_TEST"),
    }
)
"""Variables that no import looks at. Processes that differ in another one have servers of their own."""


def environment_of_tests(**variables: str) -> dict[str, str]:
    """Of processes that tests start: one thread each, the local network, and this repository's modules."""
    paths = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]))
    same = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": paths}
    return os.environ | same | variables


class ForkedProcess:
    """A process that a server has forked, in a session of its own; the part of subprocess.Popen that tests use."""

    def __init__(self, pid: int, server: socket.socket) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self.lost = False
        """Whether the server died first, which alone could tell how this process ended; it was killed then."""
        self._server = server

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0.0)
        return self.returncode

    def kill(self) -> None:
        """With all its children."""
        _kill_group_of(self.pid)

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, as subprocess has it. Raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            self._server.settimeout(timeout)
            try:
                said = self._server.recv(MESSAGE_BYTES)
            except (BlockingIOError, TimeoutError):
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0) from None
            except ConnectionResetError:
                said = b""
            self._server.close()
            self.lost = not said
            if self.lost:
                _kill_group_of(self.pid)
            self.returncode = -signal.SIGKILL if self.lost else int(said)
        return self.returncode


def kill_group(process: ForkedProcess | subprocess.Popen) -> None:
    """End a process that leads a group, with all its children: checkpoint writers outlive their parent otherwise."""
    _kill_group_of(process.pid)
    process.wait()


def _kill_group_of(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


class ForkServer:
    """A running server; its imports have seen `environment`.

    Args:
        preload: `module:function` that it calls for its imports, and words for it.
    """

    def __init__(self, environment: Mapping[str, str], preload: Sequence[str] = PACKAGE) -> None:
        self.environment = dict(environment)
        self._log = tempfile.TemporaryFile()
        self._control, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.distributed.fork_server", *preload],
                cwd=REPOSITORY,
                env=self.environment,
                stdin=theirs,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._ready = False

    def fork(self, request: Mapping[str, object], streams: Sequence[int]) -> ForkedProcess:
        """Raises ConnectionError when the server is gone."""
        self._wait_until_ready()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            socket.send_fds(self._control, [b"f"], [theirs.fileno(), *streams])
        ours.sendall(json.dumps(request).encode())
        pid = ours.recv(MESSAGE_BYTES)
        if not pid:
            raise ConnectionResetError("the fork server has died")
        return ForkedProcess(int(pid), ours)

    def close(self) -> None:
        """End the server and what it has forked."""
        self._control.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._log.close()

    def _wait_until_ready(self) -> None:
        if self._ready:
            return
        self._control.settimeout(START_SECONDS)
        self._ready = self._control.recv(8) != b""
        self._control.settimeout(None)
        if not self._ready:
            self._log.seek(0)
            raise AssertionError(f"the fork server did not start:\n{self._log.read().decode(errors='replace')}")


_servers: dict[tuple[str, int], ForkServer] = {}
"""By what they were preloaded with and by hash seed: the ranks of a world order their sets and hashes differently, as
processes that start apart do."""


def server_for(
    environment: Mapping[str, str], hash_seed: int = 0, preload: Sequence[str] = PACKAGE, name: str = ""
) -> ForkServer:
    """The server whose imports have seen this environment; another one's place is taken.

    Args:
        preload: of a server that is not there yet.
        name: of servers with that preload.
    """
    key = name, hash_seed
    server = _servers.get(key)
    if server is not None and (server.process.poll() is not None or not _same(server.environment, environment)):
        _servers.pop(key).close()
    if key not in _servers:
        _servers[key] = ForkServer({**environment, "PYTHONHASHSEED": str(1 + hash_seed)}, preload)
    return _servers[key]


def _same(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    return all(one.get(name) == other.get(name) for name in (one.keys() | other.keys()) - READ_LATE)


@atexit.register
def close_servers() -> None:
    while _servers:
        _servers.popitem()[1].close()


def start_forked(
    module: str,
    arguments: Sequence[str],
    folder: Path,
    environment: Mapping[str, str],
    streams: tuple[int, int, int],
    hash_seed: int = 0,
) -> ForkedProcess:
    """Run `python -m module *arguments` in a fork, with files as its standard input, output and errors."""
    request = {
        "module": module,
        "arguments": list(arguments),
        "folder": str(folder),
        "environment": dict(environment),
    }
    try:
        return server_for(environment, hash_seed).fork(request, streams)
    except ConnectionError:  # it was killed a moment ago
        _servers.pop(("", hash_seed)).close()
        return server_for(environment, hash_seed).fork(request, streams)


def run_forked(
    module: str,
    *arguments: object,
    folder: Path,
    timeout: float,
    merged: bool = False,
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    """What `subprocess.run([python, "-m", module, *arguments], text=True)` gives, from a fork.

    Args:
        merged: whether errors go where the output goes.
        variables: of its environment, beside `environment_of_tests`.
    """
    words = [str(word) for word in arguments]
    out, to_out = os.pipe()
    err, to_err = os.pipe()
    with open(os.devnull, "rb") as nothing:
        streams = (nothing.fileno(), to_out, to_out if merged else to_err)
        try:
            process = start_forked(module, words, folder, environment_of_tests(**variables), streams)
        finally:
            os.close(to_out)
            os.close(to_err)
    said = {out: bytearray(), err: bytearray()}
    deadline = time.monotonic() + timeout
    try:
        if not _read_to_end(said, deadline):
            raise subprocess.TimeoutExpired([module, *words], timeout, bytes(said[out]), bytes(said[err]))
        process.wait(max(deadline - time.monotonic(), 0.1))
    finally:
        kill_group(process)
        os.close(out)
        os.close(err)
    if process.lost:
        raise AssertionError(f"the fork server has died while it ran {[module, *words]}")
    texts = [text.decode(errors="replace") for text in said.values()]
    return subprocess.CompletedProcess([module, *words], process.wait(), texts[0], None if merged else texts[1])


def _read_to_end(said: dict[int, bytearray], deadline: float) -> bool:
    """Read all files to their ends; False when the time was over before."""
    with selectors.DefaultSelector() as selector:
        for file in said:
            selector.register(file, selectors.EVENT_READ)
        while selector.get_map():
            ready = selector.select(max(deadline - time.monotonic(), 0.0))
            if not ready:
                return False
            for key, _ in ready:
                more = os.read(key.fd, 1 << 16)
                said[key.fd] += more
                if not more:
                    selector.unregister(key.fd)
    return True
