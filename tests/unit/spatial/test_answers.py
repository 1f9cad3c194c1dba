import numpy as np
import pytest

from megatron_rb.spatial.answers import parse_points, parse_points_with_depth, parse_score
from megatron_rb.spatial.prompts import format_points, format_points_with_depth, format_score


def test_written_answers_read_back():
    points = np.array([[0, 1000], [176, 788]])
    trace = np.array([[176, 788, 0.945], [278, 518, 1.005]])
    assert (parse_points(format_points(points)).points == points).all()
    assert (parse_points_with_depth(format_points_with_depth(trace)).points == trace).all()
    assert parse_score(format_score(-0.5)).hop == -0.5


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


@pytest.mark.parametrize(
    ("text", "hop"),
    [("<score>+12%</score>", 0.12), ("so <score>-7.5%</score>", -0.075), ("<score>0%</score>", 0.0),
     ("<score>+250%</score>", 1.0)],
)  # fmt: skip
def test_scores(text, hop):
    assert parse_score(text).ok and parse_score(text).hop == pytest.approx(hop)


@pytest.mark.parametrize("text", ["+12%", "<score>12</score>", "<score>+1%</score><score>+2%</score>"])
def test_anything_but_one_score_is_a_failure_that_moves_nothing(text):
    assert not parse_score(text).ok and parse_score(text).hop == 0.0


def test_zero_score_has_no_sign():
    assert format_score(0.004) == format_score(-0.004) == "<score>0%</score>"
    assert format_score(0.125) == "<score>+12%</score>"
