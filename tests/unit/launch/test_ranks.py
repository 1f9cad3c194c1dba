"""What ends an attempt, and its outcome, from what is reported of its ranks: the same on one machine and on many."""

import pytest

from megatron_rb.launch.beats import Hang
from megatron_rb.launch.failure import Failure, FailureKind
from megatron_rb.launch.ranks import Ranks


@pytest.fixture
def ranks() -> Ranks:
    return Ranks({0: "a", 1: "a", 2: "b", 3: "b"}, attempt=4)


def test_the_first_rank_that_fails_is_the_cause(ranks: Ranks):
    ranks.move(2, "checkpoint", 7)
    ranks.end(2, 1)
    ranks.end(0, 137)
    assert ranks.failure == Failure(
        FailureKind.RANK, "rank 2 on b failed with exit code 1 after step 7", 1, 2, "b", "checkpoint"
    )


def test_wrong_input_explains_the_ranks_that_broke_off_before(ranks: Ranks):
    ranks.end(2, 1)
    ranks.end(0, 2)
    assert ranks.failure is not None
    assert (ranks.failure.kind, ranks.failure.rank) == (FailureKind.CONFIGURATION, 0)


def test_a_rank_that_breaks_off_later_does_not_hide_wrong_input(ranks: Ranks):
    ranks.end(0, 2)
    ranks.end(2, 1)
    assert ranks.failure is not None and ranks.failure.code == 2


def test_a_hang_names_machine_limit_and_the_stacks_of_its_attempt(ranks: Ranks):
    ranks.hang(Hang(rank=3, phase="step", step=5, seconds=61.0, limit=60.0))
    assert ranks.failure == Failure(
        FailureKind.HANG,
        "rank 3 on b made no progress for 61 s in phase 'step' after step 5 (limit 60 s); stacks of all ranks are in "
        "stacks/attempt_4",
        124,
        3,
        "b",
        "step",
    )


def test_what_failed_before_explains_a_hang(ranks: Ranks):
    ranks.end(1, 1)
    ranks.hang(Hang(3, "step", 5, 61.0, 60.0))
    assert ranks.failure is not None and ranks.failure.kind is FailureKind.RANK


def test_the_moment_of_the_first_failure_is_kept(ranks: Ranks):
    ranks.end(2, 1)
    noticed = ranks.noticed_at
    ranks.fail(Failure(FailureKind.NODE, "b has not answered"))
    assert noticed is not None and ranks.noticed_at == noticed


def test_machines_with_running_ranks_are_unfinished(ranks: Ranks):
    ranks.end(2, 0)
    ranks.end(3, 0)
    assert ranks.unfinished_nodes(("b", "a")) == ["a"] and not ranks.all_ended()


@pytest.mark.parametrize(
    ("phase", "asked", "outcome"),
    [
        ("finished", True, "finished"),
        ("checkpoint", True, "stopped"),
        ("checkpoint", False, "stopped"),
        ("start", False, "finished"),
        ("start", True, "stopped"),
    ],
)
def test_an_end_without_failure_is_told_by_rank_zero(ranks: Ranks, phase: str, asked: bool, outcome: str):
    ranks.move(0, phase, 9)
    result = ranks.result(asked, slowest={"step": 1.0})
    assert (result.outcome, result.last_step, result.slowest) == (outcome, 9, {"step": 1.0})


def test_a_failed_rank_decides_whatever_rank_zero_says(ranks: Ranks):
    ranks.move(0, "finished", 9)
    ranks.end(1, 1)
    assert ranks.result(False, {}).outcome == "failed"


@pytest.mark.parametrize("code", [143, 130, 138])
def test_a_rank_that_died_of_a_stop_explains_those_that_broke_off(ranks: Ranks, code: int):
    ranks.end(2, 1)
    ranks.end(1, code)
    assert (ranks.result(True, {}).outcome, ranks.result(True, {}).failure) == ("stopped", None)
    assert ranks.result(False, {}).outcome == "failed"


def test_a_rank_that_failed_by_itself_while_it_was_stopped_has_failed(ranks: Ranks):
    ranks.move(2, "checkpoint", 5)
    ranks.end(2, 9)
    ranks.end(1, 143)
    assert ranks.result(True, {}).outcome == "failed"


def test_the_first_step_of_any_rank_is_dated_once(ranks: Ranks):
    ranks.move(1, "init", 0)
    assert ranks.first_step_at is None
    ranks.move(1, "step", 1)
    dated = ranks.first_step_at
    ranks.move(0, "step", 2)
    assert dated is not None and ranks.first_step_at == dated
