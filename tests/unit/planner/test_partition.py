"""The cut is exact: equal to brute force for the programme's objective and for the simulated one."""

import dataclasses
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rb.layout import PipelineLayout
from megatron_rb.planner.device import load_device, with_memory
from megatron_rb.planner.memory import stage_memory
from megatron_rb.planner.partition import NEVER, best_cut, extrapolated, first_cut, play, refine
from megatron_rb.planner.predict import best_for, build_pipeline
from megatron_rb.planner.schedule import simulate
from megatron_rb.planner.task import Degrees
from tests.unit.planner.cases import task, tiny


def cuts_of(blocks: int, slices: int):
    for inner in combinations(range(1, blocks), slices - 1):
        yield (0, *inner, blocks)


def value(tables, cut, batches: int) -> int:
    times = [int(table[a, b]) for table, a, b in zip(tables, cut, cut[1:], strict=False)]
    return int(NEVER) if max(times) >= NEVER else sum(times) + (batches - 1) * max(times)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_programme_equals_brute_force(data):
    blocks = data.draw(st.integers(2, 9))
    slices = data.draw(st.integers(1, min(blocks, 5)))
    batches = data.draw(st.integers(1, 6))
    times = st.one_of(st.integers(1, 12), st.just(int(NEVER)))
    tables = [
        np.array([[data.draw(times) if a < b else NEVER for b in range(blocks + 1)] for a in range(blocks + 1)])
        for _ in range(slices)
    ]
    least = min(value(tables, cut, batches) for cut in cuts_of(blocks, slices))
    lengths = best_cut(tables, batches)
    if lengths is None:
        assert least >= NEVER
    else:
        assert value(tables, np.concatenate([[0], np.cumsum(lengths)]), batches) == least


@pytest.mark.parametrize("family", ["RoboBrain2.0-7B", "RoboBrain2.5-4B"])
@pytest.mark.parametrize(
    ("pp", "vpp", "cp", "share"),
    [
        (2, 1, 1, 1.0),
        (3, 1, 1, 1.0),
        (3, 1, 1, 0.5),
        (4, 1, 1, 0.4),
        (2, 2, 1, 1.0),
        (2, 2, 1, 0.5),
        (3, 1, 2, 0.5),
        (2, 2, 4, 0.5),
    ],
)
def test_cut_and_recompute_equal_brute_force_by_simulation(family: str, pp: int, vpp: int, cp: int, share: float):
    """Every cut, played one by one; `share` of the memory of the fastest forces recompute."""
    work = task(tiny(3, 4, family), gpus=pp * cp, global_batch_size=24)
    degrees = Degrees(1, pp, vpp, 1, 1, False, cp)
    free = build_pipeline(work, degrees)
    held = free.memory.reserved + share * (1.04 * 11 * free.memory.kept.max() * pp)
    pipeline = type(free)(**{**vars(free), "limit": held})
    blocks = pipeline.num_blocks
    everything = [play(pipeline, np.array([cut])) for cut in cuts_of(blocks, pp * vpp)]
    least = min(float(item.seconds[0]) for item in everything)
    lengths = first_cut(pipeline)
    if lengths is None:
        assert not np.isfinite(least)
        return
    assert float(refine(pipeline, lengths).seconds[0]) == pytest.approx(least, rel=1e-12)


def test_recompute_of_a_slice_is_the_cheapest_that_fits():
    work = task(tiny(3, 4), gpus=1, device=with_memory(load_device("h200"), 141e9))
    free = build_pipeline(work, Degrees(1, 1, 1, 1, 1, False))
    cut = np.array([[0, free.num_blocks]])
    counts = free.prefix[-1]
    saved = free.memory.kept - free.memory.inputs
    again = free.memory.working + free.memory.kept
    # Two layers with windows and one without.
    saved_vision, again_vision = ((2 * values[1] + values[2]) / 3 for values in (saved, again))
    forward = free.forward.mean(axis=(1, 2))
    static = sum(free.memory.static(counts))
    for short in (0.1, 1.5, 2.5, 4.5, 6.0):
        limit = (static + counts @ free.memory.kept + again.max() - short * saved[6]) * 1.04 + free.memory.reserved
        found = play(type(free)(**{**vars(free), "limit": float(limit)}), cut)
        options = []
        for vision in range(4):
            for language in range(5):
                working = max(free.memory.working.max(), (vision > 0) * again_vision, (language > 0) * again[6])
                used = static + counts @ free.memory.kept + working - vision * saved_vision - language * saved[6]
                extra = free.vision_prefix[vision] @ forward + language * forward[6]
                options.append((extra if used * 1.04 + free.memory.reserved <= limit else np.inf, vision, language))
        cheapest = min(options)[0]
        assert bool(found.choices.fits[0, 0]) == bool(np.isfinite(cheapest))
        if np.isfinite(cheapest):
            vision, language = int(found.choices.vision[0, 0]), int(found.choices.language[0, 0])
            assert free.vision_prefix[vision] @ forward + language * forward[6] == pytest.approx(cheapest)


def test_a_long_step_is_extrapolated_exactly_when_micro_batches_are_equal():
    ahead = np.ones((3, 100))
    whole = simulate(3, 1, ahead, 2 * ahead, np.zeros((2, 100)))
    part = simulate(3, 1, ahead[:, :20], 2 * ahead[:, :20], np.zeros((2, 20)))
    guessed = extrapolated(part, np.array(9.0), 20, 100)
    assert float(guessed.makespan) == float(whole.makespan)
    np.testing.assert_allclose(guessed.busy, whole.busy)


def test_vit_can_be_kept_on_the_first_slice():
    work = task(tiny(6, 2), gpus=2, global_batch_size=24)
    spread = best_for(work, Degrees(1, 2, 1, 1, 1, False))
    together = best_for(work, Degrees(1, 2, 1, 1, 1, False), least_first=8)
    assert spread.layout.slice_lengths[0] < 8 <= together.layout.slice_lengths[0]
    assert spread.step_seconds < together.step_seconds


@pytest.mark.parametrize("family", ["RoboBrain2.0-7B", "RoboBrain2.5-4B"])
@pytest.mark.parametrize(("pp", "vpp"), [(2, 1), (3, 1), (4, 1), (2, 2)])
@pytest.mark.parametrize("share", [0.5, 0.8])
def test_every_cut_that_fits_does_so_by_the_forecast_of_the_run_too(family, pp, vpp, share):
    """The forecast knows which vision layers keep less and what DeepStack features wait for their layers."""
    work = task(tiny(6, 6, family), gpus=pp, global_batch_size=24)
    free = build_pipeline(work, Degrees(1, pp, vpp, 1, 1, False, 1))
    limit = free.memory.reserved + share * 1.04 * 11 * free.memory.kept.max() * pp
    memory = dataclasses.replace(free.memory, feature=float(free.memory.kept.max()))  # many pictures
    pipeline = type(free)(**{**vars(free), "limit": limit, "memory": memory})
    played = play(pipeline, np.array(list(cuts_of(pipeline.num_blocks, pp * vpp))[::7]))
    fitting = np.flatnonzero(played.choices.fits.all(axis=1))
    assert len(fitting), limit
    for number in fitting:
        layout = PipelineLayout(6, 6, played.lengths(number), pp)
        stages = stage_memory(pipeline.memory, layout, played.recompute(number), pipeline.num_micro_batches)
        assert max(stage.total for stage in stages) <= limit * (1 + 1e-9), played.lengths(number)
