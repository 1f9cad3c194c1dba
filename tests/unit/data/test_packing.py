"""Packing under two budgets."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rb.data.packing import Budget, fill_step, most_that_fit, plan_step, share_out

BUDGET = Budget(tokens=100, patches=40)
SIZES = st.lists(st.tuples(st.integers(1, 100), st.integers(0, 40)), min_size=1, max_size=60)


@settings(deadline=None)
@given(SIZES, st.integers(1, 4), st.integers(1, 3))
def test_every_sample_is_in_one_bin_within_both_budgets(sizes, dp_size, multiple):
    table = np.array(sizes)
    plan = plan_step(table, BUDGET, dp_size, multiple)
    bins = [members for rank in plan for members in rank]
    assert sorted(item for members in bins for item in members) == list(range(len(sizes)))
    assert all((table[members].sum(axis=0) <= BUDGET.limits).all() for members in bins if members)


@settings(deadline=None)
@given(SIZES, st.integers(1, 4), st.integers(1, 3))
def test_ranks_hold_the_same_multiple_of_bins(sizes, dp_size, multiple):
    plan = plan_step(np.array(sizes), BUDGET, dp_size, multiple)
    assert len(plan) == dp_size
    assert {len(rank) % multiple for rank in plan} == {0}
    assert len({len(rank) for rank in plan}) == 1


@settings(deadline=None)
@given(SIZES)
def test_no_more_bins_than_samples_and_no_fewer_than_the_budget_needs(sizes):
    table = np.array(sizes)
    count = len(plan_step(table, BUDGET, 1, 1)[0])
    assert np.ceil(table.sum(axis=0) / BUDGET.limits).max() <= count <= len(sizes)


def test_fewer_samples_than_ranks_leave_bins_empty():
    assert plan_step(np.array([[5, 0]]), BUDGET, 2, 2) == [[[0], []], [[], []]]


def test_bins_are_even_in_tokens_and_in_patches():
    rng = np.random.default_rng(3)
    sizes = np.stack([rng.integers(100, 2000, 256), 4 * rng.integers(0, 500, 256)], axis=1)
    plan = plan_step(sizes, Budget(8192, 16384), 4, 1)
    loads = np.array([sizes[members].sum(axis=0) for rank in plan for members in rank])
    assert (loads.max(axis=0) / loads.mean(axis=0) < 1.1).all()
    ranks = np.array([sum(sizes[members].sum(axis=0) for members in rank) for rank in plan])
    assert (ranks.max(axis=0) / ranks.mean(axis=0) < 1.03).all()


def test_a_sample_over_the_budget_is_named():
    with pytest.raises(ValueError, match="41 patches does not fit .* 40 patches"):
        plan_step(np.array([[5, 41]]), BUDGET, 1, 1)


@settings(deadline=None)
@given(SIZES, st.integers(1, 3), st.integers(1, 3))
def test_a_filled_step_takes_the_next_samples_each_once_within_both_budgets(sizes, dp_size, per_rank):
    table = np.array(sizes)
    taken, plan = fill_step(table, BUDGET, dp_size, dp_size * per_rank)
    assert [len(rank) for rank in plan] == [per_rank] * dp_size
    bins = [members for rank in plan for members in rank]
    assert sorted(item for members in bins for item in members) == list(range(taken))
    assert all((table[members].sum(axis=0) <= BUDGET.limits).all() for members in bins if members)
    assert 1 <= taken <= max(1, most_that_fit(table, BUDGET, dp_size * per_rank))


@settings(deadline=None)
@given(SIZES, st.integers(1, 4))
def test_one_micro_batch_takes_samples_up_to_the_first_that_does_not_fit(sizes, extra):
    table = np.array(sizes + [(100, 40)] * extra)
    taken, _ = fill_step(table, BUDGET, 1, 1)
    over = (np.cumsum(table, axis=0) > BUDGET.limits).any(axis=1)
    assert taken == int(np.argmax(over))


@settings(deadline=None)
@given(SIZES, st.integers(1, 3))
def test_the_spread_of_a_step_does_not_change_which_samples_it_takes(sizes, per_rank):
    table = np.array(sizes)
    assert fill_step(table, BUDGET, 1, 4 * per_rank)[0] == fill_step(table, BUDGET, 4, 4 * per_rank)[0]


def test_samples_are_exchanged_until_patches_are_even():
    rng = np.random.default_rng(5)
    tokens = rng.integers(200, 3000, 400)
    sizes = np.stack([tokens, np.where(rng.random(400) < 0.3, 0, 4 * (tokens * rng.random(400)).astype(int))], axis=1)
    taken, plan = fill_step(sizes, Budget(8192, 32768), 8, 64)
    loads = np.array([sizes[members].sum(axis=0) for rank in plan for members in rank])
    assert loads[:, 0].mean() > 0.97 * 8192
    assert loads[:, 1].max() / loads[:, 1].mean() < 1.05


def test_a_sample_over_the_budget_is_named_when_filling():
    with pytest.raises(ValueError, match="41 patches does not fit .* 40 patches"):
        fill_step(np.array([[5, 4], [5, 41]]), BUDGET, 1, 1)


def test_more_than_a_group_of_micro_batches_is_filled_without_a_gap():
    rng = np.random.default_rng(7)
    sizes = np.stack([rng.integers(5, 60, 2400), 4 * rng.integers(0, 5, 2400)], axis=1)
    taken, plan = fill_step(sizes, BUDGET, 4, 600)
    bins = [members for rank in plan for members in rank]
    assert sorted(item for members in bins for item in members) == list(range(taken))
    loads = np.array([sizes[members].sum(axis=0) for members in bins])
    assert len(loads) == 600 and (loads <= BUDGET.limits).all()
    assert loads[:, 0].mean() > 95


def test_work_is_shared_out_evenly():
    assert share_out(np.array([5, 3, 3, 2, 0, 0]), 2) == [0, 1, 1, 0, 1, 0]
    assert share_out(np.array([4, 9]), 1) == [0, 0] and share_out(np.array([], dtype=int), 3) == []
    owners = share_out(np.random.default_rng(0).integers(0, 1000, 100), 8)
    loads = np.bincount(owners, np.random.default_rng(0).integers(0, 1000, 100), 8)
    assert loads.max() - loads.min() < 100
