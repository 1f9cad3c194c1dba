"""The store over which the ranks of a world find each other, kept by a process of its own beside rank 0.

It has a connection to every rank: 8,191 in the largest worlds. In a process of its own they do not count against the
open files of rank 0, and a rank that computes does not keep the others waiting for an answer.
"""

from __future__ import annotations

import os
import signal
import socket
import time
import warnings
from datetime import timedelta

import torch.distributed as dist

LONGEST_ERROR = 1 << 16
LOOK_AFTER_RANK_ZERO = 0.2
"""Seconds between two looks at whether rank 0 still lives."""
OF_THE_RUN = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""Signals that a launcher or Slurm sends to all processes of a rank; the ranks still need the store then."""


def agent_keeps_store() -> bool:
    """Whether torchrun keeps the store of this world in its own process."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)


def join_store(rank: int, timeout: timedelta) -> dist.Store:
    """The store at MASTER_ADDR and MASTER_PORT; rank 0 starts the process that keeps it.

    Raises:
        RuntimeError: the port cannot be used; on other machines, or a little later, it may be free.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if rank == 0:
        _start_keeper(port, timeout)
    return dist.PrefixStore("default_pg", dist.TCPStore(address, port, timeout=timeout))  # as torch's env:// names it


def _start_keeper(port: int, timeout: timedelta) -> None:
    """Fork the process that keeps the store; it ends with this one."""
    ours, theirs = socket.socketpair()
    parent = os.getpid()
    with ours, theirs, warnings.catch_warnings():
        # Python warns of threads, which a fork lacks; this one asks for nothing that they could have locked.
        warnings.simplefilter("ignore", DeprecationWarning)
        if os.fork() == 0:
            _keep(port, timeout, theirs, parent)
        theirs.close()
        problem = ours.recv(LONGEST_ERROR).decode()
    if problem != "kept":
        raise RuntimeError(
            f"the store of the world cannot be kept at port {port} (MASTER_PORT): {problem or 'its process has ended'}"
        )


def _keep(port: int, timeout: timedelta, told: socket.socket, parent: int) -> None:
    """What the forked process does; it does not return."""
    try:
        for each in OF_THE_RUN:
            signal.signal(each, signal.SIG_IGN)
        store, problem = None, "kept"
        try:
            store = dist.TCPStore("127.0.0.1", port, None, True, timeout, wait_for_workers=False)
        except (RuntimeError, ValueError) as error:
            problem = str(error).splitlines()[0]
        told.sendall(problem.encode())
        told.close()
        while store is not None and os.getppid() == parent:
            time.sleep(LOOK_AFTER_RANK_ZERO)
    finally:
        os._exit(0)  # whatever rank 0 does at its end is not for this process to do
