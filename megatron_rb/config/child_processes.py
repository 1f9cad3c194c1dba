"""Processes that a command starts end with it, however it ends."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_PR_SET_PDEATHSIG = 1
STOPPED = 130
"""Exit code of a command that Ctrl-C or SIGTERM has ended."""


def follow_parent() -> Callable[[], None] | None:
    """`preexec_fn` of a new process: the kernel shall kill it when this one dies, even by SIGKILL (Linux only)."""
    if sys.platform != "linux":
        return None
    prctl, parent = ctypes.CDLL(None, use_errno=True).prctl, os.getpid()

    def follow() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # died before the line above
            os._exit(1)

    return follow


@contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """SIGTERM stops as Ctrl-C does, by a KeyboardInterrupt, so that what was begun is cleared away."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
