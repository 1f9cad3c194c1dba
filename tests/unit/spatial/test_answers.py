import numpy as np
import pytest

from megatron_rb.spatial.answers import (
    FRACTIONS,
    AnswerProblem,
    parse_box,
    parse_points,
    parse_points_with_depth,
)
from megatron_rb.spatial.points import ImageSize
from megatron_rb.spatial.prompts import format_points, format_points_with_depth
from megatron_rb.spatial.text_answers import parse_choice, parse_length, parse_number


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


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[(1, 2, nan)]", AnswerProblem.NOT_A_NUMBER),
        ("(1, 2, -inf)", AnswerProblem.NOT_A_NUMBER),
        ("[1, 2, null]", AnswerProblem.NOT_A_NUMBER),
        ("(1, 2, None)", AnswerProblem.NOT_A_NUMBER),
        ("(1, 2, 0)", AnswerProblem.BAD_DEPTH),
        ("(1, 2, -0.5)", AnswerProblem.BAD_DEPTH),
        ("(1, 2, 1e999)", AnswerProblem.BAD_DEPTH),
        ("(1, 2, 1050)", AnswerProblem.BAD_DEPTH),
        ("(1, 2)", AnswerProblem.WRONG_LENGTH),
    ],
)
def test_depth_that_is_none_has_a_kind(text, problem):
    assert parse_points_with_depth(text).problem is problem


def test_depth_must_be_positive_metres():
    assert "positive" in parse_points_with_depth("(1, 2, 0)").reason
    assert "positive" in parse_points_with_depth("(1, 2, 1e999)").reason


@pytest.mark.parametrize(
    "text",
    [
        "```json\n[[12, 34]]\n```",
        '[{"point_2d": [12, 34], "label": "cube"}]',
        '<point x="12" y="34" alt="c">c</point>',
        "<think>(1, 1)?</think><answer>[(12, 34)]</answer>",
        "（12，34）",
        "12, 34",
        '{"x": 12, "y": 34}',
        "x=12, y=34",
        "( 12 ; 34 )",
        "[(12, 34),]",
        "<think></think><answer>[(12, 34)]",
        '<points x1="12" y1="34">',
    ],
)
def test_more_spellings_of_one_point(text):
    assert parse_points(text).points.tolist() == [[12.0, 34.0]], parse_points(text).reason


@pytest.mark.parametrize(
    "text", ["[(12, 34, 1.5)]", "(12, 34, 1.5m)", "12, 34, 1.500", "[12, 34, 1.5 meters]", "x: 12, y: 34, depth: 1.5"]
)
def test_spellings_of_a_point_with_depth(text):
    assert parse_points_with_depth(text).points.tolist() == [[12.0, 34.0, 1.5]], parse_points_with_depth(text).reason


def test_flat_lists_of_points():
    assert parse_points("[1, 2, 3, 4, 5, 6]").points.tolist() == [[1, 2], [3, 4], [5, 6]]
    assert parse_points_with_depth("[1, 2, 0.3, 4, 5, 0.6]").points.tolist() == [[1, 2, 0.3], [4, 5, 0.6]]
    assert parse_points("[1, 2, 3, 4]").problem is AnswerProblem.WRONG_LENGTH  # four numbers are a box


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[(12, 34), (5,", AnswerProblem.INCOMPLETE),
        ("[(12, 34), (5, 6", AnswerProblem.INCOMPLETE),
        ("(", AnswerProblem.INCOMPLETE),
        ("", AnswerProblem.EMPTY),
        ("it is left of it", AnswerProblem.NOT_FOUND),
        ("import os\nos.remove('x')", AnswerProblem.CODE),
        ("(1, 2), " * 2000, AnswerProblem.TOO_LONG),
        ("1, " * 10**6, AnswerProblem.TOO_LONG),
        ("[(0.5, 1200)]", AnswerProblem.OUT_OF_RANGE),
    ],
)
def test_failures_have_a_kind(text, problem):
    assert parse_points(text).problem is problem


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "text",
    [
        "(" * 99_999,
        "(1," * 30_000,
        "1 " * 49_000,
        " " * 99_999,
        "(1" + " " * 90_000,
        "<think>" * 10_000,
        "<answer>" * 12_000,
        "(" + "1," * 45_000,
        "<point " * 12_000,
        '"x": 1, ' * 12_000,
        "answer: " * 12_000,
        "answer: " + "(" * 90_000,
        "\\scalar{1" * 9000,
        "(1 " * 30_000 + "nan",
    ],
)
def test_hostile_answers_take_no_time(text):
    for parse in (parse_points, parse_points_with_depth, parse_box, parse_length, parse_choice):
        assert not parse(text).ok
    read = parse_number(text)
    assert read.value == 1 or not read.ok  # one number, said any number of times


def test_pixels_and_grid_are_told_apart_by_the_caller():
    shown = ImageSize(1920, 1080)
    assert parse_points("(1500, 800)", shown).points.tolist() == [[1500, 800]]
    assert parse_points("(1500, 800)").problem is AnswerProblem.OUT_OF_RANGE
    assert "outside 1920 x 1080" in parse_points("(1500, 1081)", shown).reason


@pytest.mark.parametrize(
    "text", ["[10, 20, 30, 40]", "[(10, 20), (30, 40)]", '{"bbox_2d": [10, 20, 30, 40]}', "[30, 40, 10, 20]"]
)
def test_boxes(text):
    assert parse_box(text).box.tolist() == [10, 20, 30, 40]


@pytest.mark.parametrize(
    ("text", "metres"),
    [
        ("0.104m", 0.104),
        ("10.4 cm", 0.104),
        ("about 4 inches.", 0.1016),
        ("4 in", 0.1016),
        ('4"', 0.1016),
        ("[Measuring] [cup] 0.104m", 0.104),
        ("10 cm, that is 0.1 m", 0.1),
        ("1,250 mm", 1.25),
        ("2 feet", 0.6096),
        (r"\scalar{10.4} \distance_unit{cm}", 0.104),
        (r"1 m? No: \scalar{4}\distance_unit{inches}", 0.1016),
    ],
)
def test_lengths(text, metres):
    assert parse_length(text).metres == pytest.approx(metres)


def test_lengths_that_are_not_clear_fail():
    assert parse_length("10 cm or 20 cm").problem is AnswerProblem.AMBIGUOUS
    assert parse_length("12").problem is AnswerProblem.UNKNOWN_UNIT
    assert parse_length("12", default_unit="cm").metres == pytest.approx(0.12)
    assert parse_length("-3 cm").problem is AnswerProblem.OUT_OF_RANGE


@pytest.mark.parametrize(
    "text",
    [
        "B",
        "(B)",
        "b",
        "(b)",
        "B. the cup",
        "B, the cup",
        "The answer is B",
        "<answer>B</answer>",
        "Option B)",
        "**B**",
        "Answer: B because it is red",
        "**Answer:** (B)",
        r"so it is \boxed{B}",
        r"\boxed{\text{B}}",
        "Answer: **B. the cup**",
        "A is too far and C is behind it, so the answer is B.",
        "<think>A? No.</think>\nB",
        "I choose option B",
    ],
)
def test_choices(text):
    assert parse_choice(text).letter == "B"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("A or B", AnswerProblem.AMBIGUOUS),
        ("The answer is A or B", AnswerProblem.AMBIGUOUS),
        ("E", AnswerProblem.NOT_FOUND),
        ("A cup stands there", AnswerProblem.NOT_FOUND),
        ("the answer is a cup", AnswerProblem.NOT_FOUND),
        ("", AnswerProblem.EMPTY),
        ("(A) left (B) right", AnswerProblem.AMBIGUOUS),
    ],
)
def test_choices_that_are_not_clear_fail(text, problem):
    assert parse_choice(text).problem is problem and parse_choice(text).letter == ""


def test_fractions_are_not_taken_for_another_unit():
    for size in (None, ImageSize(640, 480)):
        assert parse_points("[(0.5, 0.25), (1, 0.3)]", size).problem is AnswerProblem.OTHER_UNIT
        assert parse_points_with_depth("(0.5, 0.25, 1.2)", size).problem is AnswerProblem.OTHER_UNIT
        assert parse_box("[0.1, 0.2, 0.5, 0.6]", size).problem is AnswerProblem.OTHER_UNIT
        assert "fractions of the image" in parse_points("(0.5, 0.25)", size).reason
    # the upper left corner itself, and points of which only one coordinate is small, are nothing else
    for text in ("(0, 0)", "(1, 1)", "(0.5, 3)", "[(0.5, 0.5), (3, 4)]"):
        assert parse_points(text).ok, text
    assert parse_points("(0.5, 0.25)", FRACTIONS).points.tolist() == [[0.5, 0.25]]
    assert parse_points("(0.5, 1.25)", FRACTIONS).problem is AnswerProblem.OUT_OF_RANGE


def test_points_anywhere_are_given_back_when_asked_for():
    assert parse_points("(-5, 1200)", anywhere=True).points.tolist() == [[-5.0, 1200.0]]
    assert parse_points("(-5, 1200)").problem is AnswerProblem.OUT_OF_RANGE


@pytest.mark.parametrize(
    ("text", "value"), [("3", 3), ("There are 1,250.", 1250), ("Twelve.", 12), ("2.5, yes 2.5", 2.5), ("-1e2", -100)]
)
def test_numbers(text, value):
    assert parse_number(text).value == value


@pytest.mark.parametrize("text", ["", "many", "2 or 3", "one or two", "9" * 100_001])
def test_numbers_that_are_not_clear_fail(text):
    assert parse_number(text).problem is not None and parse_number(text).value != parse_number(text).value
