"""A process that has imported torch, megatron-core and the package, and forks itself into what tests start.

`python -m tests.distributed.fork_server module:function [word …]` calls the function with the words, for its imports,
then reads requests from the socket that is its standard input; forked.py sends them. Every request comes with a socket
of its own: the new process's id goes there, and in the end its exit status.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import random
import re
import runpy
import selectors
import signal
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy
import torch

from megatron_rb.platform import get_platform
from megatron_rb.platform.mcore_shims import install_mcore_shims
from tests.architecture.source_tree import sources
from tests.distributed.forked import MESSAGE_BYTES

STANDARD_STREAMS = 3
NOT_PRELOADED = re.compile(r"^if __name__ ==|^\s*(import|from) (triton|liger_kernel)", re.MULTILINE)
"""What marks the modules that run as programs, and those for which a package may be missing."""
LOOK_AFTER_PARENT = 1.0
"""Seconds between two looks at whether the parent, pytest, still lives."""


@dataclass(frozen=True)
class Request:
    """What a forked process is to be; it runs `python -m module *arguments`."""

    module: str
    arguments: list[str]
    folder: str
    """Its working folder."""
    environment: dict[str, str]
    """All of it."""


@dataclass
class Child:
    pid: int
    watch: int
    """Becomes readable when the process ends (pidfd)."""
    client: socket.socket


def preload_package() -> None:
    """Import what worlds and commands need, on the CPU; modules that are run as programs are left out."""
    install_mcore_shims(get_platform("cpu"))
    for source in sources():
        if not NOT_PRELOADED.search(source.path.read_text(encoding="utf-8")):
            importlib.import_module(source.module)


def preload(target: str, words: list[str]) -> None:
    """Call what imports.

    Raises RuntimeError when an import has left a thread behind: a forked process would hang on its locks.
    """
    torch.set_num_threads(1)
    module, _, function = target.partition(":")
    getattr(importlib.import_module(module), function)(*words)
    threads = os.listdir("/proc/self/task")
    if len(threads) != 1:
        raise RuntimeError(f"{len(threads)} threads run after the imports; a process with threads cannot be forked")
    gc.freeze()


def serve(control: socket.socket) -> Request | None:
    """Fork for every request until the other side is gone; returns the request in each fork, None in the server."""
    children: list[Child] = []
    with selectors.DefaultSelector() as selector:
        selector.register(control, selectors.EVENT_READ)
        for event in _events(selector):
            if event is not None:
                selector.unregister(event.watch)
                children.remove(event)
                _report_end(event)
                continue
            received = _receive(control)
            if received is None:
                break
            request, client, streams = received
            pid = os.fork()
            if pid == 0:
                _leave_server(control, client, children, streams)
                return request
            child = Child(pid, os.pidfd_open(pid), client)
            children.append(child)
            selector.register(child.watch, selectors.EVENT_READ, child)
            for stream in streams:
                os.close(stream)
    for child in children:
        _kill(child)
    return None


def _events(selector: selectors.BaseSelector) -> Iterator[Child | None]:
    """Children that have ended, and None for a request or its end; ends itself when the parent is gone."""
    parent = os.getppid()
    while os.getppid() == parent:
        for key, _ in selector.select(LOOK_AFTER_PARENT):
            yield key.data


def _receive(control: socket.socket) -> tuple[Request, socket.socket, list[int]] | None:
    """The next request with its client's socket and its standard streams; None when there will be no more."""
    note, files, _, _ = socket.recv_fds(control, 1, 1 + STANDARD_STREAMS)
    if not note:
        return None
    client = socket.socket(fileno=files[0])
    said = client.recv(MESSAGE_BYTES)
    return (Request(**json.loads(said)), client, list(files[1:])) if said else None


def _report_end(child: Child) -> None:
    os.close(child.watch)
    code = os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1])
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        child.client.sendall(b"%d" % code)
    child.client.close()


def _kill(child: Child) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    os.kill(child.pid, signal.SIGKILL)  # it may not lead its group yet
    _report_end(child)


def _leave_server(control: socket.socket, client: socket.socket, children: list[Child], streams: list[int]) -> None:
    """In the fork: a session of its own, its own standard streams, and no file of the server.

    Whoever learns the process's id can rely on its being the id of its group too.
    """
    os.setsid()
    client.sendall(b"%d" % os.getpid())
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    for file in [control.detach(), client.detach(), *streams]:
        if file >= STANDARD_STREAMS:
            os.close(file)
    for child in children:
        os.close(child.watch)
        child.client.close()


def run(request: Request) -> None:
    """Go on as `python -m` does in a new process.

    What ranks draw without a seed differs between them, as it does in new processes, but it is the same in every run.
    """
    os.chdir(request.folder)
    seed = 1 + int(request.environment.get("RANK", "0"))
    random.seed(seed)
    numpy.random.seed(seed)
    os.environ.clear()
    os.environ.update(request.environment)
    sys.argv[1:] = request.arguments
    sys.path[0] = request.folder
    runpy.run_module(request.module, run_name="__main__", alter_sys=True)


def main() -> None:
    control = socket.socket(fileno=os.dup(0))
    preload(sys.argv[1], sys.argv[2:])
    control.sendall(b"ready\n")
    request = serve(control)
    if request is None:
        os._exit(0)  # to take all modules down would last a second
    run(request)


if __name__ == "__main__":
    main()
