"""Packing under two budgets."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rb.data.packing import Budget, plan_step

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
