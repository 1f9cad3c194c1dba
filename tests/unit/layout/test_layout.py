"""The layout text parses, prints and refuses in the user's words; the balanced cut is optimal."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rb.layout import Kind, PipelineLayout, balanced_layout, parse_layout


def test_text_round_trip():
    text = "P v*20 | v*12 M E t*4 | t*12 | t*12 L"
    layout = parse_layout(text, 32, 28, 4)
    assert str(layout) == text
    assert layout.slice(1).layers(Kind.VISION) == tuple(range(20, 32))
    assert layout.slice(2).layers(Kind.DECODER) == tuple(range(4, 16))
    assert layout.pp_rank_of(Kind.HEAD) == 3 and layout.slice(0).needs_pixels and layout.slice(3).needs_labels


def test_virtual_chunks_are_dealt_round_robin():
    layout = parse_layout("P v*2 | v*1 M E | t*1 | t*1 L", 3, 2, 2)
    assert layout.vpp_size == 2
    assert [part.index for part in layout.slices_of_rank(1)] == [1, 3]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.data())
def test_any_layout_prints_and_parses_to_itself(vision, decoder, data):
    total = vision + decoder + 4
    parts = data.draw(st.integers(1, total))
    cuts = sorted(data.draw(st.sets(st.integers(1, total - 1), min_size=parts - 1, max_size=parts - 1)))
    lengths = tuple(b - a for a, b in itertools.pairwise([0, *cuts, total]))
    layout = PipelineLayout(vision, decoder, lengths, parts)
    assert parse_layout(str(layout), vision, decoder, parts) == layout


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("P v*3 M E t*2 L", "misses blocks: it has 3 x vision layer"),
        ("P v*5 M E t*2 L", "repeats blocks: it has 5 x vision layer"),
        ("P v*4 M M E t*2 L", "repeats blocks: it has 2 x merger"),
        ("P v*4 E M t*2 L", "order of blocks"),
        ("P v*4 M E t*2 L | ", "empty slice"),
        ("P w*4 M E t*2 L", "the word 'w\\*4'"),
        ("P v*4 | M E t*1 | t*1 L", "which pp_size 2 does not divide"),
    ],
)
def test_wrong_layouts_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_layout(text, 4, 2, 2)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=6, max_size=9), st.integers(1, 4))
def test_balanced_cut_equals_brute_force(costs, parts):
    layout = balanced_layout(costs, 1, parts)
    ends = list(itertools.accumulate(layout.slice_lengths))
    worst = max(sum(costs[a:b]) for a, b in itertools.pairwise([0, *ends]))
    brute = min(
        max(sum(costs[a:b]) for a, b in itertools.pairwise([0, *cuts, len(costs)]))
        for cuts in itertools.combinations(range(1, len(costs)), parts - 1)
    )
    assert worst == brute


def test_several_slices_on_one_stage_are_refused():
    with pytest.raises(ValueError, match="pp_size is 1, interleaved 1F1B needs 2 or more; write the layout without"):
        parse_layout("P v*4 | M E t*2 L", 4, 2, 1)
