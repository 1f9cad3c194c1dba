"""Bubbles of pipelines whose timelines are written by hand."""

import pytest

from megatron_rb.metrics.timeline import Span, StageTimeline, bubble_ratios, pass_seconds


def stage(pp_rank: int, *words: str, pipeline: int = 0, rank: int | None = None) -> StageTimeline:
    """Words such as `F0-1` and `B3-5`: kind, start, end."""
    spans = []
    for word in words:
        start, end = map(float, word[1:].split("-"))
        spans.append(Span({"F": "forward", "B": "backward"}[word[0]], start, end))
    return StageTimeline(pp_rank if rank is None else rank, pp_rank, pipeline, tuple(spans))


# 1F1B of three micro-batches on two stages, forward 1 and backward 2 units: the bubble is (p - 1) / (m + p - 1).
ONE_F_ONE_B = [
    stage(0, "F0-1", "F1-2", "B4-6", "F6-7", "B7-9", "B10-12"),
    stage(1, "F1-2", "B2-4", "F4-5", "B5-7", "F7-8", "B8-10"),
]


def test_textbook_1f1b():
    assert bubble_ratios(ONE_F_ONE_B) == pytest.approx({0: 1 / 4, 1: 1 / 4})
    assert pass_seconds(ONE_F_ONE_B) == 12


def test_an_uneven_stage_leaves_the_others_idle():
    ratios = bubble_ratios([stage(0, "F0-4", "B6-8"), stage(1, "F4-5", "B5-6")])
    assert ratios == pytest.approx({0: 2 / 8, 1: 6 / 8})


def test_pipelines_are_measured_on_their_own():
    slow = [stage(0, "F0-2", "B6-10", pipeline=1, rank=2), stage(1, "F2-4", "B4-6", pipeline=1, rank=3)]
    assert bubble_ratios([*ONE_F_ONE_B, *slow]) == pytest.approx({0: 1 / 4, 1: 1 / 4, 2: 4 / 10, 3: 6 / 10})


def test_one_stage_that_always_computes_has_no_bubble():
    assert bubble_ratios([stage(0, "F0.5-1", "B1-3")]) == {0: 0.0}


def test_busy_seconds_by_kind():
    assert (ONE_F_ONE_B[0].busy("forward"), ONE_F_ONE_B[0].busy("backward"), ONE_F_ONE_B[0].busy()) == (3, 6, 9)


def test_a_pipeline_without_passes_is_refused():
    with pytest.raises(ValueError, match="pipeline 0 has no forward"):
        bubble_ratios([stage(0)])
