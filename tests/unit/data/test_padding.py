"""The sizes that micro-batches are padded to."""

import numpy as np
import pytest

from megatron_rb.data.packing import Budget, plan_step
from megatron_rb.data.padding import PaddingPolicy, Size, fragmentation, largest_micro_batch, plan_sizes

MULTIPLE = Size(2, 8)


def policy(tokens: int = 100, patches: int = 800) -> PaddingPolicy:
    return PaddingPolicy(Size(tokens, patches), MULTIPLE, num_buckets=4)


def test_the_first_step_has_the_largest_size_and_later_ones_a_bucket():
    padding = policy()
    assert padding.plan([Size(10, 16), Size(30, 0)]).sizes == (Size(100, 800),) * 2
    assert padding.plan([Size(10, 16), Size(30, 0)]).sizes == (Size(26, 200), Size(52, 200))
    assert padding.plan([Size(99, 800)]).sizes == (Size(100, 800),)


def test_tokens_and_patches_are_counted_apart():
    padding = policy()
    padding.plan([])
    assert padding.plan([Size(90, 8)]).sizes == (Size(100, 200),)
    assert padding.plan([Size(8, 790)]).sizes == (Size(26, 800),)


def test_nothing_is_ever_cut_and_there_are_few_sizes():
    rng = np.random.default_rng(0)
    padding = policy(1000, 4000)
    padding.plan([])
    seen = set()
    for _ in range(300):
        size = Size(int(rng.integers(0, 1001)), int(rng.integers(0, 4001)))
        (padded,) = padding.plan([size]).sizes
        assert padded.tokens >= size.tokens and padded.patches >= size.patches
        assert padded.tokens % 2 == 0 and padded.patches % 8 == 0
        seen.add(padded)
    assert len({size.tokens for size in seen}) <= 4 and len({size.patches for size in seen}) <= 4
    assert max(size.tokens for size in seen) <= 1000 and max(size.patches for size in seen) <= 4000


@pytest.mark.parametrize("size", [Size(101, 8), Size(8, 801), Size(300, 900)])
def test_only_a_micro_batch_above_all_earlier_ones_starts_anew(size):
    padding = policy()
    assert padding.plan([Size(50, 80)]).outgrown is None
    assert padding.plan([Size(100, 800)]).outgrown is None
    plan = padding.plan([Size(10, 8), size])
    assert plan.outgrown == Size(100, 800)
    assert plan.sizes == (padding.largest,) * 2
    assert padding.largest.tokens >= size.tokens and padding.largest.patches >= size.patches
    assert padding.plan([size]).outgrown is None


def test_after_a_restart_the_next_step_is_a_first_one():
    padding = policy()
    padding.plan([])
    padding.restart()
    assert padding.plan([Size(1, 1)]).sizes == (Size(100, 800),)


def test_sizes_of_an_evaluation_do_not_depend_on_the_steps_before():
    padding = policy()
    before = padding.bucket(Size(60, 100)), padding.bucket(Size(200, 100))
    padding.plan([Size(500, 5000)])
    assert (padding.bucket(Size(60, 100)), padding.bucket(Size(200, 100))) == before == (Size(78, 200), Size(200, 200))


def test_every_rank_finds_the_same_sizes_without_asking():
    sizes = np.random.default_rng(1).integers(1, 50, (24, 2))
    plan = plan_step(sizes, Budget(100, 100), dp_size=3, micro_batch_multiple=1)
    found = plan_sizes(sizes, plan)
    assert len(found) == len(plan[0])
    for number, size in enumerate(found):
        loads = [sizes[rank[number]].sum(axis=0) for rank in plan]
        assert size == Size(int(max(load[0] for load in loads)), int(max(load[1] for load in loads)))


def test_no_micro_batch_of_a_data_set_is_above_its_largest():
    rng = np.random.default_rng(2)
    sizes = rng.integers(1, 90, (60, 2))
    budget = Budget(100, 120)
    largest = largest_micro_batch(sizes, Size(100, 120), samples_per_step=6)
    for _ in range(50):
        step = sizes[rng.choice(60, 6, replace=False)]
        for size in plan_sizes(step, plan_step(step, budget, dp_size=2, micro_batch_multiple=1)):
            assert size.tokens <= largest.tokens and size.patches <= largest.patches
    assert largest_micro_batch(np.array([[3, 8], [5, 0]]), Size(100, 100), 6) == Size(8, 8)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="num_buckets 0"):
        PaddingPolicy(Size(1, 1), MULTIPLE, 0)


def test_fragmentation_is_the_share_without_a_tensor():
    assert fragmentation(75, 100) == 0.25
    assert fragmentation(None, 100) is None and fragmentation(5, None) is None
