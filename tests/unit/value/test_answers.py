import pytest

from megatron_rb.spatial.answers import AnswerProblem
from megatron_rb.value.answers import format_score, parse_score


@pytest.mark.parametrize(
    ("text", "hop"),
    [
        ("<score>+12%</score>", 0.12),
        ("so <score>-7.5%</score>", -0.075),
        ("<score>0%</score>", 0.0),
        ("<score>+250%</score>", 1.0),
        ("<score> + 12 % </score>", 0.12),
        ("<score>12</score>", 0.12),
        ("<SCORE>−12%</SCORE>", -0.12),
        ("<score>.5%</score>", 0.005),
        ("<score>33%", 0.33),
        ("<score>33%<score>", 0.33),
        ("<think><score>+1%</score>?</think>\n<score>+2%</score>", 0.02),
        ("<score>+2%</score>\n<score>+2%</score>", 0.02),
    ],
)
def test_scores_are_read(text, hop):
    assert parse_score(text).ok and parse_score(text).hop == pytest.approx(hop)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("+12%", AnswerProblem.NOT_FOUND),
        ("", AnswerProblem.NOT_FOUND),
        ("<score>", AnswerProblem.NOT_A_NUMBER),
        ("<score>+1%</score><score>+2%</score>", AnswerProblem.AMBIGUOUS),
        ("<score>nan%</score>", AnswerProblem.NOT_A_NUMBER),
        ("<score>1 2</score>", AnswerProblem.NOT_A_NUMBER),
        ("<score>" + "1" * 10**6, AnswerProblem.TOO_LONG),
        ("print('<score>' + str(x))", AnswerProblem.NOT_A_NUMBER),
    ],
)
def test_anything_but_one_score_is_a_failure_that_moves_nothing(text, problem):
    answer = parse_score(text)
    assert not answer.ok and answer.hop == 0.0 and answer.problem is problem and answer.reason
    assert answer.or_nan != answer.or_nan


def test_both_quantisations_by_hand():
    assert format_score(0.125) == "<score>+12%</score>"
    assert format_score(-0.1234, "tenths") == "<score>-12.3%</score>"
    assert format_score(0.004) == format_score(-0.004) == "<score>0%</score>"
    assert format_score(-0.0004, "tenths") == "<score>0.0%</score>"
    with pytest.raises(ValueError, match="'halves' is not known"):
        format_score(0.1, "halves")


@pytest.mark.parametrize(("quantisation", "step"), [("percent", 0.01), ("tenths", 0.001)])
def test_written_scores_read_back_within_half_a_step(quantisation, step):
    for hop in (i / 997 for i in range(-997, 998)):
        assert abs(parse_score(format_score(hop, quantisation)).hop - hop) <= step / 2 + 1e-12
