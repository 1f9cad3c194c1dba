"""The simulated schedules against closed forms, hand-computed cases and what megatron-core counts."""

import numpy as np
import pytest

from megatron_rb.planner.schedule import Exchange, Pass, most_in_flight, rank_program, simulate


def uniform(pp: int, vpp: int, batches: int) -> float:
    ahead = np.ones((pp * vpp, batches))
    return float(simulate(pp, vpp, ahead, 2 * ahead, np.zeros((pp * vpp - 1, batches))).makespan)


@pytest.mark.parametrize(("pp", "batches"), [(1, 5), (2, 1), (2, 7), (4, 2), (4, 16), (8, 8)])
def test_equal_times_give_the_closed_form_of_1f1b(pp: int, batches: int):
    assert uniform(pp, 1, batches) == 3 * (batches + pp - 1)


@pytest.mark.parametrize(("pp", "vpp", "batches"), [(2, 2, 4), (4, 2, 4), (4, 2, 16), (4, 3, 8), (8, 4, 16)])
def test_equal_times_give_the_closed_form_of_interleaving(pp: int, vpp: int, batches: int):
    assert uniform(pp, vpp, batches) == 3 * (batches * vpp + pp - 1)


def test_two_stages_and_two_uneven_batches_by_hand():
    # Stage 0: F0 0-2, sent as stage 1 waits; F1 2-6, but stage 1 takes it only after B0.
    # Stage 1: F0 2-5, B0 5-9, then exchanges B0 for F1 at 9, F1 9-10, B1 10-12. Stage 0: B0 9-10, B1 12-15.
    ahead, back = np.array([[2.0, 4.0], [3.0, 1.0]]), np.array([[1.0, 3.0], [4.0, 2.0]])
    events: list = []
    timing = simulate(2, 1, ahead, back, np.zeros((1, 2)), events)
    assert float(timing.makespan) == 15.0
    assert [(rank, step.kind, step.micro_batch, start, end) for rank, step, start, end in sorted(events)] == [
        (0, "B", 0, 9.0, 10.0),
        (0, "B", 1, 12.0, 15.0),
        (0, "F", 0, 0.0, 2.0),
        (0, "F", 1, 2.0, 6.0),
        (1, "B", 0, 5.0, 9.0),
        (1, "B", 1, 10.0, 12.0),
        (1, "F", 0, 2.0, 5.0),
        (1, "F", 1, 9.0, 10.0),
    ]
    assert timing.busy.tolist() == [10.0, 10.0]
    assert float(timing.bubble_ratio) == pytest.approx(1 - 10 / 15)


def test_messages_hold_up_both_sides():
    ahead = np.ones((2, 1))
    timing = simulate(2, 1, ahead, ahead, np.full((1, 1), 0.5))
    assert float(timing.makespan) == 1 + 0.5 + 1 + 1 + 0.5 + 1


def test_many_draws_are_played_at_once():
    draw = np.random.default_rng(0)
    ahead, back, move = draw.random((6, 6, 5)), draw.random((6, 6, 5)), draw.random((5, 6, 5))
    together = simulate(3, 2, ahead, back, move).makespan
    single = [float(simulate(3, 2, ahead[..., k], back[..., k], move[..., k]).makespan) for k in range(5)]
    np.testing.assert_allclose(together, single)


@pytest.mark.parametrize(("pp", "vpp", "batches"), [(2, 1, 1), (3, 1, 5), (4, 1, 3), (2, 2, 6), (3, 3, 6), (4, 2, 4)])
def test_every_pass_happens_once_and_every_message_has_two_ends(pp: int, vpp: int, batches: int):
    programs = [rank_program(pp, vpp, batches, rank) for rank in range(pp)]
    passes = [step for program in programs for step in program if isinstance(step, Pass)]
    wanted = {Pass(kind, part, number) for kind in "FB" for part in range(pp * vpp) for number in range(batches)}
    assert len(passes) == len(wanted) and set(passes) == wanted
    ends = [
        message for program in programs for step in program if isinstance(step, Exchange) for message in step.messages
    ]
    assert sorted(ends) == sorted(
        2 * [(way, k, n) for way in "fb" for k in range(pp * vpp - 1) for n in range(batches)]
    )


def test_stages_hold_as_many_micro_batches_as_megatron_core_lets_in():
    assert [most_in_flight(4, 1, 16, rank).tolist() for rank in range(4)] == [[[4]], [[3]], [[2]], [[1]]]
    assert most_in_flight(4, 1, 2, 0).tolist() == [[2]]
    # Interleaved: (pp - rank - 1) * 2 + (vpp - 1) * pp warm-up passes and one more.
    assert most_in_flight(4, 2, 16, 0).sum(axis=1).max() == 3 * 2 + 4 + 1
