"""Signals that stop a command, wherever it is."""

import os
import signal

import pytest

from megatron_rb.config.child_processes import check_stopped, held_back, stopped_by_signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_a_keyboard_interrupt(number):
    with pytest.raises(KeyboardInterrupt), stopped_by_signals():
        os.kill(os.getpid(), number)
        pytest.fail("it went on")


def test_one_that_is_swallowed_is_not_lost():
    with pytest.raises(KeyboardInterrupt), stopped_by_signals():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            pass  # as Python does in its own callbacks
        check_stopped()


def test_one_that_is_held_back_comes_at_the_end():
    seen = []
    with pytest.raises(KeyboardInterrupt), stopped_by_signals():
        with held_back():
            os.kill(os.getpid(), signal.SIGTERM)
            seen.append("whole")
        seen.append("behind")
    assert seen == ["whole"]


def test_handlers_are_those_of_before_and_nothing_is_remembered():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), stopped_by_signals():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
    with stopped_by_signals():
        check_stopped()
