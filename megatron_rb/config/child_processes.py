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
def stopped_by_signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM stop what is begun, by a KeyboardInterrupt, so that it is cleared away.

    Python swallows one that comes while it runs a callback of its own, after a fork or at the end of an object: whoever
    waits in a loop calls `check_stopped`.
    """
    _stops.clear()
    previous = {number: signal.signal(number, _stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def held_back() -> Iterator[None]:
    """A signal that comes in here stops at the end: what runs around a fork would swallow it, and say so."""
    _held.append(None)
    try:
        yield
    finally:
        _held.pop()
    check_stopped()


def check_stopped() -> None:
    """Raises KeyboardInterrupt when a signal has come that was swallowed."""
    if _stops:
        raise KeyboardInterrupt


_stops: list[int] = []
"""Signals that have come."""
_held: list[None] = []
"""One for every `held_back` at work."""


def _stop(number: int, frame: object) -> None:
    _stops.append(number)
    if not _held:
        raise KeyboardInterrupt
