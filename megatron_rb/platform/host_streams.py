"""Streams and events of a platform whose work is done when a call returns: real objects, so callers need no test."""

from __future__ import annotations

import time


class HostEvent:
    """A moment on the host's clock."""

    def __init__(self, enable_timing: bool = False) -> None:
        self._seconds: float | None = None

    def record(self, stream: HostStream | None = None) -> None:
        self._seconds = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None: ...

    def wait(self, stream: HostStream | None = None) -> None: ...

    def elapsed_time(self, end: HostEvent) -> float:
        """Milliseconds from this event to `end`; raises RuntimeError when one of them was not recorded."""
        if self._seconds is None or end._seconds is None:
            raise RuntimeError("elapsed_time needs two events that were recorded")
        return (end._seconds - self._seconds) * 1e3


class HostStream:
    """The one order in which the host works."""

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def wait_stream(self, stream: HostStream) -> None: ...

    def wait_event(self, event: HostEvent) -> None: ...

    def record_event(self, event: HostEvent | None = None) -> HostEvent:
        event = event or HostEvent(enable_timing=True)
        event.record(self)
        return event
