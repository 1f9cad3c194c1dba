import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rb.spatial.depth import DepthGate, DepthProblem, DepthReading, check_trace, read_at
from megatron_rb.spatial.points import ImageSize
from megatron_rb.spatial.traces import key_points, resample, simplify

STAIRS = np.array([[0, 0], [1, 0.1], [2, 0], [3, 2], [4, 0]])


def distance_to_segment(point, start, end):
    span = end - start
    share = np.clip((point - start) @ span / (span @ span), 0, 1) if span.any() else 0.0
    return np.linalg.norm(point - start - share * span)


def recursive(points, first, last, tolerance):
    """Ramer-Douglas-Peucker as in the textbook."""
    if last - first < 2:
        return []
    distances = [distance_to_segment(points[i], points[first], points[last]) for i in range(first + 1, last)]
    place = first + 1 + int(np.argmax(distances))
    if max(distances) <= tolerance:
        return []
    return [*recursive(points, first, place, tolerance), place, *recursive(points, place, last, tolerance)]


def test_simplified_by_hand():
    # 2 m off the base line is point 3; from 0 to 3 point 2 is 2 * 2 / sqrt(13) = 1.11 away; point 1 only 0.1
    assert simplify(STAIRS, 0.5).tolist() == [0, 2, 3, 4]
    assert simplify(STAIRS, 1.5).tolist() == [0, 3, 4]
    assert simplify(STAIRS, 3.0).tolist() == [0, 4]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 30), st.floats(0, 1))
def test_simplified_equals_the_textbook_recursion(seed, count, tolerance):
    points = np.random.default_rng(seed).normal(size=(count, 3))
    expected = [0, *recursive(points, 0, count - 1, tolerance), count - 1]
    assert simplify(points, tolerance).tolist() == expected


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 60), st.integers(2, 8))
def test_key_points_are_few_and_keep_the_ends(seed, count, most):
    points = np.cumsum(np.random.default_rng(seed).normal(size=(count, 3)), axis=0)
    kept = key_points(points, most)
    assert kept[0] == 0 and kept[-1] == count - 1 and 2 <= len(kept) <= most


def test_key_points_of_a_line_are_its_ends():
    assert key_points(np.outer(np.arange(50), [1, 0, 0])).tolist() == [0, 49]
    with pytest.raises(ValueError, match="1 points"):
        key_points(np.zeros((1, 3)))


def test_resampled_by_hand():
    # an L of length 3 + 1: points at 0, 1, 2, 3, 4
    assert resample(np.array([[0, 0], [3, 0], [3, 1]]), 5).tolist() == [[0, 0], [1, 0], [2, 0], [3, 0], [3, 1]]
    assert resample(np.array([[2.0, 2.0]]), 3).tolist() == [[2, 2]] * 3


def test_depth_readings_say_why_they_are_unusable():
    size = ImageSize(4, 1)
    depth = np.array([[0.0, np.nan, 20.0, 1.25]])
    problems = [read_at(depth, np.array([u, 0.5]), size).problem for u in (0.5, 1.5, 2.5, 3.5, 9.0)]
    assert problems == [
        DepthProblem.MISSING,
        DepthProblem.NOT_FINITE,
        DepthProblem.TOO_FAR,
        None,
        DepthProblem.OUTSIDE,
    ]
    assert read_at(depth, np.array([3.5, 0.5]), size).metres == 1.25
    assert read_at(np.array([[15.0]]), np.zeros(2), ImageSize(1, 1)).ok
    assert read_at(np.array([[15.01]]), np.zeros(2), ImageSize(1, 1)).problem is DepthProblem.TOO_FAR
    assert read_at(depth, np.array([3.5, 0.5]), ImageSize(8, 2)).problem is DepthProblem.OTHER_SIZE


def test_gate_by_hand():
    points = np.array([[0, 0, 1.0]] * 4)
    missing = DepthReading(float("nan"), DepthProblem.MISSING)
    readings = [DepthReading(1.04), DepthReading(0.96), DepthReading(0.9), missing]
    result = check_trace(points, readings)
    # two of four frames confirm; one of the three that are measured lies behind something
    assert (result.readable, result.confirmed, result.hidden) == (3, 0.5, pytest.approx(1 / 3))
    assert not result.passed and "33% of the points are hidden" in result.reason
    assert check_trace(points, readings, DepthGate(most_hidden=0.5)).passed
    agibot = check_trace(points, readings, DepthGate(confirmed_share=0.83, most_hidden=0.5))
    assert not agibot.passed and "confirms 50%" in agibot.reason
    assert check_trace(points[:1], readings[3:]).reason == "no point has a usable depth: no measurement (depth 0)"


def test_one_measured_frame_of_many_confirms_no_trace():
    points = np.array([[0, 0, 1.0]] * 10)
    readings = [DepthReading(1.0), *[DepthReading(float("nan"), DepthProblem.MISSING)] * 9]
    result = check_trace(points, readings)
    assert not result.passed and result.confirmed == pytest.approx(0.1) and "confirms 10%" in result.reason


@pytest.mark.parametrize(("surface", "passed"), [(0.951, True), (0.95, False), (1.049, True), (1.051, False)])
def test_five_centimetres_are_outside_the_tolerance(surface, passed):
    assert check_trace(np.array([[0, 0, 1.0]]), [DepthReading(surface)]).passed is passed


def test_a_third_must_be_confirmed_and_three_tenths_may_be_hidden():
    def gate(confirmed, hidden, missing):
        readings = [DepthReading(1.0)] * confirmed + [DepthReading(0.5)] * hidden
        readings += [DepthReading(float("nan"), DepthProblem.MISSING)] * missing
        return check_trace(np.array([[0, 0, 1.0]] * len(readings)), readings).passed

    assert gate(1, 0, 2) and not gate(1, 0, 3) and not gate(49, 0, 100)
    assert gate(7, 3, 0) and not gate(11, 5, 0)  # 30 % and 31 %
