import numpy as np
import pytest

from megatron_rb.spatial.answers import parse_points, parse_points_with_depth
from megatron_rb.spatial.prompts import format_points, format_points_with_depth


def test_written_answers_read_back():
    points = np.array([[0, 1000], [176, 788]])
    trace = np.array([[176, 788, 0.945], [278, 518, 1.005]])
    assert (parse_points(format_points(points)).points == points).all()
    assert (parse_points_with_depth(format_points_with_depth(trace)).points == trace).all()


@pytest.mark.parametrize("text", ["[(12, 34)]", "(12,34)", "The cube is at [12, 34].", "[[12, 34]]", "[(12.0, 34)"])
def test_common_spellings_of_one_point(text):
    assert parse_points(text).points.tolist() == [[12.0, 34.0]]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("no idea", "found no tuple"),
        ("(1, 2, 3)", "has 3 numbers, expected 2"),
        ("(1, 1001)", "outside 0-1000"),
        ("(-1, 5)", "outside 0-1000"),
        ("(1.2.3, 5)", "not a number"),
    ],
)
def test_unreadable_points_say_why(text, reason):
    answer = parse_points(text)
    assert not answer.ok and len(answer.points) == 0 and reason in answer.reason


def test_depth_must_be_positive_metres():
    assert "positive" in parse_points_with_depth("(1, 2, 0)").reason
    assert "positive" in parse_points_with_depth("(1, 2, 1e999)").reason
