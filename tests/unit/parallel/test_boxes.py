"""Runs of elements as boxes, overlaps and even shares, each against counting every element."""

import math

import numpy as np
import pytest

from megatron_rb.parallel.boxes import Segment, TensorBox, boxes_of_run, cut_evenly, place_of, strides_of


def drawn_shape(draw: np.random.Generator) -> tuple[int, ...]:
    return tuple(int(size) for size in draw.integers(1, 6, size=draw.integers(1, 5)))


def numbered(shape: tuple[int, ...]) -> np.ndarray:
    """Every element is its own number in row-major order."""
    return np.arange(math.prod(shape)).reshape(shape)


@pytest.mark.parametrize("seed", range(200))
def test_boxes_hold_the_elements_of_the_run_in_order_and_are_few(seed):
    draw = np.random.default_rng(seed)
    shape = drawn_shape(draw)
    first, stop = sorted(draw.integers(0, math.prod(shape) + 1, size=2).tolist())
    boxes = boxes_of_run(shape, first, stop)
    held = [number for box in boxes for number in numbered(shape)[box.slices()].ravel().tolist()]
    assert held == list(range(first, stop))
    assert len(boxes) <= 2 * len(shape) - 1


def test_an_empty_run_has_no_box_and_a_scalar_one():
    assert boxes_of_run((3, 4), 5, 5) == []
    assert boxes_of_run((), 0, 1) == [TensorBox((), ())]


def test_a_run_over_rows_is_an_end_whole_rows_and_a_beginning():
    assert boxes_of_run((5, 4), 3, 14) == [
        TensorBox((0, 3), (1, 1)),
        TensorBox((1, 0), (2, 4)),
        TensorBox((3, 0), (1, 2)),
    ]


@pytest.mark.parametrize("seed", range(100))
def test_an_overlap_holds_what_both_boxes_hold(seed):
    draw = np.random.default_rng(seed)
    shape = drawn_shape(draw)

    def drawn_box() -> TensorBox:
        start = tuple(int(draw.integers(0, size)) for size in shape)
        return TensorBox(
            start, tuple(int(draw.integers(1, size - low + 1)) for low, size in zip(start, shape, strict=True))
        )

    one, other = drawn_box(), drawn_box()
    inside = one.overlap(other)
    shared = set(numbered(shape)[one.slices()].ravel()) & set(numbered(shape)[other.slices()].ravel())
    assert (set() if inside is None else set(numbered(shape)[inside.slices()].ravel())) == shared
    if inside is not None:
        seen = inside.seen_from(one.start).slices()
        assert set(numbered(shape)[one.slices()][seen].ravel()) == shared


def test_the_place_of_an_element_is_its_number():
    shape = (3, 4, 5)
    assert strides_of(shape) == (20, 5, 1)
    assert place_of((2, 1, 3), shape) == numbered(shape)[2, 1, 3]


@pytest.mark.parametrize("seed", range(100))
def test_parts_are_equal_and_hold_every_element_once(seed):
    draw = np.random.default_rng(seed)
    sizes, parts = draw.integers(1, 30, size=draw.integers(1, 8)).tolist(), int(draw.integers(1, 9))
    segments = cut_evenly(sizes, parts)
    held = [(each.tensor, number) for each in segments for number in range(each.first, each.stop)]
    assert held == [(tensor, number) for tensor, size in enumerate(sizes) for number in range(size)]
    lengths = [sum(each.stop - each.first for each in segments if each.part == part) for part in range(parts)]
    assert max(lengths) - min(lengths) <= 1
    assert [each.part for each in segments] == sorted(each.part for each in segments)


def test_more_parts_than_elements_leave_parts_empty():
    assert cut_evenly([1, 1], 4) == [Segment(0, 0, 1, 1), Segment(1, 0, 1, 3)]
