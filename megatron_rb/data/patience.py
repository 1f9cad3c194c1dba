"""Reading from storage that may never answer: a limit of time, another try, then a sentence with the name."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from megatron_rb.data.problems import BadSample

READ_SECONDS = 60.0
TRIES = 2

Value = TypeVar("Value")


def answered(action: Callable[[], Value], name: str, seconds: float) -> Value:
    """What an action returns or raises.

    A read that hangs in the kernel cannot be ended, so it is left behind on a thread of its own.

    Args:
        name: what is read, for the error.
        seconds: time that each of two tries has; 0 = no limit.

    Raises:
        BadSample: neither try has come to an end in time.
    """
    if seconds <= 0:
        return action()
    for _ in range(TRIES):
        outcome = _Outcome(action)
        threading.Thread(target=outcome.run, name=f"read {name[-40:]}", daemon=True).start()
        if outcome.done.wait(seconds):
            return outcome.get()
    raise BadSample(
        "no answer",
        f"{name} did not answer {TRIES} times within {seconds:g} s (data.read_seconds); look at its storage",
    )


class _Outcome(Generic[Value]):
    def __init__(self, action: Callable[[], Value]) -> None:
        self.action = action
        self.done = threading.Event()
        self.values: list[Value] = []
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.values.append(self.action())
        except BaseException as error:  # handed on to whoever waits
            self.error = error
        self.done.set()

    def get(self) -> Value:
        if self.error is not None:
            raise self.error
        return self.values[0]
