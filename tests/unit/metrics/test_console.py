"""Console lines and the progress bar."""

import io
from collections import deque

import pytest
from rich.console import Console

from megatron_rb.metrics.columns import quantity
from megatron_rb.metrics.console import ConsoleWriter, describe, duration, remaining_seconds
from megatron_rb.metrics.record import EvalRecord
from tests.unit.metrics.records import step_record


def console(terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=100, highlight=False)


def test_without_a_terminal_every_so_many_steps_and_the_last_one_give_a_line():
    screen = console(terminal=False)
    writer = ConsoleWriter(train_steps=7, first_step=0, log_every=3, console=screen)
    for step in range(1, 8):
        writer.write_step(step_record(step))
    writer.write_eval(EvalRecord(7, {"loss": 1.25}))
    writer.close()
    *lines, evaluation = screen.file.getvalue().splitlines()
    assert [line.split()[2] for line in lines] == ["3/7", "6/7", "7/7"]
    assert evaluation.endswith("evaluation at step 7  loss 1.25")


def test_a_line_names_every_number():
    text = describe(step_record(3, grad_norm=None, memory_bytes=None, flops=2.4e12, devices=2), left=95.0)
    assert text == (
        "loss 2.5000  lr vision 1.00e-06 merger 2.00e-06 language 4.00e-06  grad norm -  2.00k tokens/s  "
        "6.00k patches/s  0.6 TFLOP/s  data wait 5%  2.00 s  left 1m35s"
    )


def test_equal_learning_rates_are_named_once_and_memory_is_shown():
    text = describe(step_record(3, learning_rates={"vision": 1e-5, "language": 1e-5}), left=0.0)
    assert "lr 1.00e-05  " in text and "memory 3.0 GiB" in text


def test_a_terminal_gets_a_bar_with_the_newest_numbers():
    screen = console(terminal=True)
    writer = ConsoleWriter(train_steps=4, first_step=2, log_every=1, console=screen)
    writer.write_step(step_record(3))
    writer.close()
    shown = screen.file.getvalue()
    assert "3/4" in shown and "75 %" in shown and "loss 2.5000" in shown


def test_the_bar_can_be_switched_off():
    screen = console(terminal=True)
    writer = ConsoleWriter(train_steps=4, first_step=0, log_every=1, bar=False, console=screen)
    writer.write_step(step_record(1))
    writer.close()
    assert "step 1/4" in screen.file.getvalue()


def test_remaining_time_is_at_the_mean_pace_of_the_recent_steps():
    assert remaining_seconds(deque([1.0, 3.0]), steps=10) == 20.0
    assert remaining_seconds(deque(), steps=10) == 0.0


@pytest.mark.parametrize(
    ("value", "text"), [(941, "941"), (1234, "1.23k"), (12345, "12.3k"), (123456, "123k"), (1.25e6, "1.25M"), (0, "0")]
)
def test_quantities_have_three_digits(value, text):
    assert quantity(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(41.6, "42s"), (185, "3m05s"), (7620, "2h07m"), (3 * 86400 + 4 * 3600, "3d04h")]
)
def test_durations_have_two_units(seconds, text):
    assert duration(seconds) == text
