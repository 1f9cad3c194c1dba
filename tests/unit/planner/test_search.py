"""The search: what it returns, what it refuses, and in which words."""

import math
from itertools import product

import numpy as np
import pytest

from megatron_rb.layout import parse_layout
from megatron_rb.planner.device import load_device, with_memory
from megatron_rb.planner.histogram import Histogram
from megatron_rb.planner.predict import evaluate, expected_maximum
from megatron_rb.planner.report import as_json, settings, table, why
from megatron_rb.planner.search import _first_look, feasible_degrees, lower_bound, plan
from megatron_rb.planner.search import sampled_bound as drawn_bound
from megatron_rb.planner.task import Degrees, Infeasible
from tests.unit.planner.cases import published, task, tiny


@pytest.fixture(scope="module")
def seven():
    work = task(published("RoboBrain2.0-7B"), gpus=64, global_batch_size=512)
    return work, plan(work)


def test_ranked_from_fast_to_slow_and_within_memory(seven):
    work, ranked = seven
    assert [item.step_seconds for item in ranked] == sorted(item.step_seconds for item in ranked)
    assert len(ranked) >= 5
    for item in ranked:
        degrees = item.degrees
        assert degrees.replica * degrees.dp == 64
        assert max(stage.total for stage in item.memory) <= work.pricing.device.memory
        assert item.layout.pp_size == degrees.pp and item.layout.vpp_size == degrees.vpp
        assert 0 < item.mfu < 1 and 0 <= item.bubble_ratio < 1
        assert item.step_seconds >= lower_bound(work, degrees)
        assert item.step_seconds >= drawn_bound(work, degrees) * 0.999


def test_json_has_what_a_script_needs(seven):
    work, ranked = seven
    content = as_json(work, ranked)
    assert content["best"] == content["ranked"][0]
    wanted = "layout tp pp vpp cp dp micro_batch recompute step_seconds tokens_per_second_per_gpu mfu bubble_ratio"
    assert {*wanted.split(), "memory_per_stage"} <= set(content["best"])
    assert content["mode"] == content["best"]["mode"] == "nominal"
    assert "not a measurement" in content["note"]
    parse_layout(content["best"]["layout"], 32, 28, content["best"]["pp"])


def test_table_says_the_mode_and_why_others_lose(seven):
    work, ranked = seven
    text = table(work, ranked)
    assert text.startswith("nominal prediction, not a measurement")
    assert f" {ranked[0].degrees.cp} " in text.splitlines()[2]
    assert "most of it" in why(ranked[0], ranked[1])


def test_given_degrees_are_kept():
    asked = {"tp": 2, "pp": 2, "vpp": 1, "cp": 2, "micro_batch": 1, "sequence_parallel": 1}
    ranked = plan(task(published("RoboBrain2.0-7B"), gpus=16, **asked))
    assert [item.degrees for item in ranked] == [Degrees(2, 2, 1, 2, 1, True, cp=2)]
    told = settings(task(published("RoboBrain2.0-7B"), gpus=16), ranked[0])
    assert told["parallel"]["cp_size"] == 2 and "cp 2" in str(ranked[0].degrees)


def test_search_looks_at_everything_that_could_win():
    """Without the bounds the same choice is the best."""
    work = task(tiny(4, 6), gpus=4, global_batch_size=32)
    best = plan(work)[0]
    singles = []
    for tp, pp, cp, packs in product((1, 2), (1, 2, 4), (1, 2, 4), (1, 2, 4)):
        if 4 % (tp * pp * cp) == 0:
            asked = {"tp": tp, "pp": pp, "cp": cp, "micro_batch": packs}
            singles += plan(task(tiny(4, 6), gpus=4, global_batch_size=32, **asked))
    assert best.step_seconds <= min(item.step_seconds for item in singles) * 1.001
    assert {item.degrees.cp for item in singles} == {1, 2, 4}


@pytest.mark.parametrize("memory", [28e9, 50e9])
def test_bounds_leave_out_nothing_that_is_faster_where_memory_is_short(memory):
    """Every choice looked at, one by one; recompute is needed by some and impossible for others."""
    work = task(published("RoboBrain2.0-7B"), gpus=8, device=with_memory(load_device("h200"), memory))
    best = min((item.seconds for d in feasible_degrees(work) if (item := _first_look(work, d))), default=math.inf)
    assert plan(work)[0].step_seconds <= best
    for degrees in feasible_degrees(work):
        item = _first_look(work, degrees)
        assert item is None or drawn_bound(work, degrees, item.seconds) <= item.seconds * (1 + 1e-9), degrees


def test_tp_above_the_kv_heads_is_refused_with_what_works():
    with pytest.raises(ValueError, match="tp_size 8 does not divide num_query_groups 4; use 1, 2 or 4"):
        plan(task(published("RoboBrain2.0-7B"), gpus=64, tp=8))


def test_sample_above_the_limit_is_refused():
    histogram = Histogram(np.array([9000]), np.array([0]), np.zeros(1), np.array([5]))
    with pytest.raises(ValueError, match="5 of 5 samples .* seq_length 4096 .* 9000"):
        plan(task(published("RoboBrain2.0-7B"), histogram=histogram))


def test_device_without_the_dtype_is_refused():
    device = load_device("h200")
    device.peak_flops.pop("bf16")
    with pytest.raises(ValueError, match="no peak_flops for bf16"):
        plan(task(published("RoboBrain2.0-7B"), device=device))


def test_memory_below_one_stage_names_the_need_and_what_would_fit():
    device = with_memory(load_device("h200"), 8e9)
    model = published("RoboBrain2.0-32B")
    with pytest.raises(Infeasible, match=r"memory binds: .* 8\.0 GB; the smallest, .* needs \d+\.\d GB") as caught:
        plan(task(model, gpus=64, device=device))
    offered = float(str(caught.value).split("max_gpu_memory=")[1].split("e9")[0]) * 1e9
    assert plan(task(model, gpus=64, device=with_memory(device, offered)))


def test_batch_too_small_for_the_gpus_says_how_large():
    model = published("RoboBrain2.0-3B")
    with pytest.raises(Infeasible, match="global_batch_size 4 binds: 8192 gpus .* at least 8"):
        plan(task(model, gpus=8192, global_batch_size=4))
    assert plan(task(model, gpus=8192, global_batch_size=8))


def test_a_batch_with_fewer_samples_than_gpus_shares_its_tokens():
    best = plan(task(published("RoboBrain2.0-3B"), gpus=64, global_batch_size=8, pp=1))[0]
    assert best.degrees.cp * best.degrees.tp >= 8


def test_parts_of_a_micro_batch_must_be_equal():
    with pytest.raises(ValueError, match="cp 3 cuts a micro-batch into 6 equal parts, .* seq_length 4096; use .* 4098"):
        plan(task(published("RoboBrain2.0-7B"), gpus=6, cp=3))


def test_gpus_that_cannot_be_split_get_the_nearest_numbers():
    with pytest.raises(ValueError, match="60 gpus cannot be split into tp 4 x pp 4; use 48 or 64 gpus"):
        plan(task(published("RoboBrain2.0-7B"), gpus=60, tp=4, pp=4))


def test_given_layout_that_does_not_fit_says_so():
    work = task(published("RoboBrain2.0-32B"), gpus=16, device=with_memory(load_device("h200"), 40e9))
    layout = parse_layout("P v*32 M E t*64 L", 32, 64, 1)
    with pytest.raises(Infeasible, match="needs .* GB on its fullest rank with everything recomputed"):
        evaluate(work, Degrees(4, 1, 1, 4, 1, True), layout)


def test_largest_of_several_ranks_is_above_the_mean():
    samples = np.array([1.0, 2.0, 3.0])
    assert expected_maximum(samples, 1) == pytest.approx(2.0)
    # Of two draws from {1, 2, 3}: 1 with 1/9, 2 with 3/9, 3 with 5/9.
    assert expected_maximum(samples, 2) == pytest.approx((1 + 3 * 2 + 5 * 3) / 9)
