"""Whether a failed run is tried again, without which machine, and what a stopped one has kept."""

import pytest

from megatron_rb.launch.record import AttemptNote
from megatron_rb.launch.verdict import judge, kept


def failed(number: int, kind: str = "rank", last_step: int = 0, resumed_from: int = 0, **more) -> AttemptNote:
    return AttemptNote(
        number,
        f"a{number}",
        ["n1", "n2"],
        0.0,
        resumed_from,
        ended=1.0,
        outcome="failed",
        last_step=last_step,
        kind=kind,
        cause="it broke",
        phase=more.pop("phase", "step"),
        **more,
    )


def test_numbers_that_are_not_finite_are_never_tried_again():
    verdict = judge([failed(1, "numbers")], max_retries=9)
    assert not verdict.retry and "not finite" in verdict.reason


def test_wrong_configuration_is_never_tried_again():
    verdict = judge([failed(1, "configuration")], max_retries=9)
    assert not verdict.retry and "settings are wrong" in verdict.reason


def test_same_step_twice_ends_the_run():
    verdict = judge([failed(1, last_step=6), failed(2, last_step=6)], max_retries=9)
    assert not verdict.retry and verdict.reason.startswith("step 7 failed twice")


def test_lost_machines_at_the_same_step_do_not_end_the_run():
    assert judge([failed(1, "node", 6, node="n1"), failed(2, "node", 6, node="n2")], max_retries=9).retry


def test_retries_are_counted_without_progress_only():
    fruitless = [failed(1, last_step=1), failed(2, last_step=2), failed(3, last_step=3)]
    assert not judge(fruitless, max_retries=2).retry
    fruitful = [failed(n, last_step=n * 10 + n, resumed_from=n * 10) for n in range(30)]
    assert judge(fruitful, max_retries=1).retry


def test_lost_machine_and_repeated_failures_on_one_are_excluded():
    assert judge([failed(1, "node", node="n2")], 3).exclude == "n2"
    on_one = [failed(number, last_step=number, node="n2") for number in (1, 2, 3)]
    assert judge(on_one, 3).exclude == "n2"
    assert judge([failed(1, last_step=1, node="n1"), *on_one[1:]], 3).exclude == ""


@pytest.mark.parametrize(
    ("checkpoint", "last_step", "words"),
    [
        (0, 0, "no step was done, and nothing is saved"),
        (0, 1, "step 1 is lost, the newest checkpoint is none"),
        (0, 4, "steps 1 to 4 are lost, the newest checkpoint is none"),
        (5, 7, "steps 6 to 7 are lost, the newest checkpoint is of step 5"),
        (7, 7, "the run is saved at step 7"),
        (7, 0, "the run is saved at step 7"),
    ],
)
def test_what_a_stopped_run_has_kept_is_told(checkpoint, last_step, words):
    assert kept(checkpoint, last_step) == words
