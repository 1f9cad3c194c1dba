"""Stop requests."""

import os
import signal
import threading

import pytest

from megatron_rb.train.signals import StopRequest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_recorded_and_nothing_else_happens(number):
    with StopRequest() as stop:
        assert not stop.requested and stop.reason == ""
        os.kill(os.getpid(), number)
        assert stop.requested
        assert stop.reason == number.name


def test_previous_handlers_return():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_first_signal_is_the_reason():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reason == "SIGUSR1"


def test_other_threads_are_refused():
    errors = []

    def enter():
        try:
            StopRequest().__enter__()
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert "main thread" in errors[0]
