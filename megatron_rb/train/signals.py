"""A stop request by signal: the run finishes its step, saves and leaves."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""SIGTERM and Ctrl-C end a run; Slurm sends SIGUSR1 some time before the limit of a job (`--signal=B:USR1@120`)."""


class StopRequest:
    """Records the first stop signal inside a `with` block; the loop asks `requested` at the end of a step.

    It is one rank's view. The caller agrees with the other ranks, so that all leave at the same step.
    """

    def __init__(self, signals: Sequence[signal.Signals] = STOP_SIGNALS) -> None:
        self._signals = tuple(signals)
        self._previous: dict[signal.Signals, Any] = {}
        self._received: signal.Signals | None = None

    @property
    def requested(self) -> bool:
        return self._received is not None

    @property
    def reason(self) -> str:
        """Name of the signal, or an empty string."""
        return self._received.name if self._received is not None else ""

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("signals can be received in the main thread only; enter StopRequest there")
        for number in self._signals:
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        # Nothing but an assignment: the signal may arrive inside any other code, the logging module included.
        if self._received is None:
            self._received = signal.Signals(number)
