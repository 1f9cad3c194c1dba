"""Questions of every kind and unit, by hand; whatever is wrong with an answer has a reason and counts."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from megatron_rb.evaluation.html_report import PREDICTED, TRUE, draw
from megatron_rb.scores.scoring import score, score_all, summarise
from megatron_rb.scores.truth import mask_of
from megatron_rb.tools import eval as eval_tool


@pytest.fixture()
def root(tmp_path):
    """A picture of 20 x 10 pixels whose mask is its right half."""
    mask = np.zeros((10, 20), dtype=np.uint8)
    mask[:, 10:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    Image.new("RGB", (20, 10)).save(tmp_path / "picture.png")
    return tmp_path


POINT = {
    "question_id": "p",
    "question": "?",
    "question_type": "point",
    "img_path": "picture.png",
    "mask_path": "mask.png",
    "answer": "mask.png",
}


def run(root, questions, answers, *more):
    (root / "data.json").write_text(json.dumps(questions))
    (root / "said.json").write_text(json.dumps([{"question_id": key, "answer": said} for key, said in answers.items()]))
    words = ["--data", str(root), "--answers", str(root / "said.json"), "--out", str(root / "out"), *more]
    assert eval_tool.main(words) == 0
    return json.loads((root / "out/results.json").read_text())


@pytest.mark.parametrize(
    ("coordinates", "right", "wrong"),
    [
        ("", "[(750, 500)]", "[(15, 5)]"),
        ("0-1000", "[(750, 500)]", "[(15, 5)]"),
        ("pixels", "[(15, 5)]", "[(5, 5)]"),
        ("fractions", "[(0.75, 0.5)]", "[(0.25, 0.5)]"),
        ("flagevalmm", "so\nAnswer: [(0.75, 0.5), (15, 5)]", "(750, 500)"),
    ],
)
def test_answers_are_read_in_the_unit_that_is_said(root, coordinates, right, wrong):
    more = ["--coordinates", coordinates] if coordinates else []
    for text, wanted in ((right, 1.0), (wrong, 0.0)):
        entry = run(root, [POINT], {"p": text}, *more)["summary"]["pointing"]
        assert (entry["score"], entry["half_or_more"], entry["failed"]) == (wanted, wanted, 0)


@pytest.mark.parametrize(
    ("coordinates", "text", "problem"),
    [
        ("0-1000", "(0.75, 0.5)", "coordinates of another unit"),
        ("pixels", "(0.75, 0.5)", "coordinates of another unit"),
        ("flagevalmm", "nowhere", "nothing of the form that was asked for"),
    ],
)
def test_answers_of_another_unit_are_failures_with_their_reason(root, coordinates, text, problem):
    entry = run(root, [POINT], {"p": text}, "--coordinates", coordinates)["summary"]["pointing"]
    assert entry["score"] == 0.0 and entry["problems"] == {problem: 1}


def test_points_outside_miss_and_boxes_stand_for_their_pixels(root):
    def said(text):
        return score(POINT, text, root)

    assert said("[(750, 500), (1200, 500)]").score == 0.5 and not said("[(1200, 500)]").failure
    assert said("[250, 0, 1000, 1000]").score == pytest.approx(2 / 3)  # pixels 5 to 19, of which ten are on the mask


BOX = {
    "question_id": "b",
    "question": "?",
    "question_type": "box",
    "img_path": "picture.png",
    "frame": "pixels",
    "size": [20, 10],
    "answer": "[0, 0, 10, 10]",
}


def test_a_truth_in_pixels_is_compared_with_answers_in_either_unit(root):
    # half of the true box and as much beside it: 50 of 150 pixels
    assert run(root, [BOX], {"b": "[5, 0, 15, 10]"})["summary"]["box"]["score"] == pytest.approx(1 / 3)
    grid = run(root, [BOX], {"b": "[250, 0, 750, 1000]"}, "--coordinates", "0-1000")
    assert grid["summary"]["box"]["score"] == pytest.approx(1 / 3)
    nowhere = {key: value for key, value in BOX.items() if key not in ("size", "img_path")}
    with pytest.raises(ValueError, match="question b .*does not say of which picture"):
        run(root, [nowhere], {})


def test_boxes_are_counted_at_three_thresholds(root):
    grid = {"question_id": "b", "question_type": "box", "answer": "[0, 0, 100, 100]"}
    texts = ["[0, 0, 92, 100]", "[0, 0, 80, 100]", "[0, 0, 60, 100]", "[0, 0, 40, 100]", "nowhere"]
    table = summarise([score(grid, text, root) for text in texts])["box"]
    assert [table[f"iou@{t}"] for t in ("0.5", "0.75", "0.9")] == pytest.approx([0.6, 0.4, 0.2])
    assert table["score"] == pytest.approx((0.92 + 0.8 + 0.6 + 0.4) / 5)


def test_failed_traces_count_as_the_point_at_the_origin(root):
    trace = {"question_id": "t", "question_type": "trace_2d", "answer": "[(300, 400), (600, 800)]"}
    results = [score(trace, text, root) for text in ("[(300, 400), (600, 800)]", "up")]
    assert results[1].failure and results[1].score == 0.0
    # to (0, 0): 0.5 and 1.0; the shared first point is 0.5 away
    assert results[1].measures["dfd"] == results[1].measures["hd"] == pytest.approx(1.0)
    assert results[1].measures["rmse"] == pytest.approx(0.5)
    table = summarise(results)["trace_2d"]
    assert table["dfd"] == pytest.approx(0.5) and table["failed"] == 1 and table["score"] == 0.5


def test_plans_that_are_no_json_are_failures_and_wrong_plans_are_not(root):
    plan = {"question_id": "q", "question_type": "plan", "answer": '["go", "stop"]'}
    said = ['["go","stop"]', '```json\n["go", "stop"]\n```', '["go"]', "go, then stop", "[" * 50_000, '["go", ', ""]
    results = [score(plan, text, root) for text in said]
    assert [result.score for result in results] == [1, 1, 0, 0, 0, 0, 0]
    assert [bool(result.failure) for result in results] == [False, False, False, True, True, True, True]
    words = plan | {"answer": "close the gripper"}
    assert score(words, " close the gripper\n", root).score == 1.0 and not score(words, "open it", root).failure


@pytest.mark.parametrize(
    ("question", "right", "wrong"),
    [
        ({"question_type": "multiple-choice", "options": list("vwxyz"), "answer": "E"}, "(E)", "D"),
        ({"question_type": "multiple-choice", "options": ["a cup", "a box"], "answer": "B"}, "a box", "a cup"),
        ({"question_type": "multiple-choice", "options": ["a cup", "a box"], "answer": "a box"}, "B", "A"),
        ({"question_type": "route_planning", "options": ["left", "right"], "answer": "A"}, "a", "b"),
        ({"question_type": "object_counting", "answer": "4"}, "four", "40"),
        ({"question_type": "numerical", "answer": "2.5"}, "It is 2.5 m.", "25"),
        ({"question_type": "yes-no", "answer": "Yes"}, "I look.\n**Yes**, it is.", "No."),
        ({"question_type": "length", "metres": 0.1, "unit": "cm"}, "12", "30"),
        ({"question_type": "length", "answer": "10 cm"}, r"\scalar{0.12} \distance_unit{m}", "0.3 m"),
    ],
)
def test_kinds_and_names_of_flagevalmm(root, question, right, wrong):
    question = question | {"question_id": "q"}
    assert score(question, right, root).score > 0.5 and not score(question, right, root).failure
    assert score(question, wrong, root).score == 0.0 and not score(question, wrong, root).failure
    assert score(question, "Hard to tell.", root).failure


@pytest.mark.parametrize(
    "question",
    [
        {"question_type": "pointing", "mask_path": "gone.png"},
        {"question_type": "pointing"},
        {"question_type": "uvd", "mask_path": "mask.png", "answer": "(1, 2)"},
        {"question_type": "box", "answer": "[1, 2, 3]"},
        {"question_type": "trace_2d", "answer": ""},
        {"question_type": "length", "answer": "12"},
        {"question_type": "length", "answer": "0 cm"},
        {"question_type": "number", "answer": "0"},
        {"question_type": "number", "answer": "some"},
        {"question_type": "multiple-choice", "answer": "the cup"},
        {"question_type": "hop", "answer": "+5%"},
        {"question_type": "yes-no", "answer": "maybe"},
        {"question_type": "essay"},
        {},
    ],
)
def test_a_question_at_fault_is_named_before_anybody_is_asked(root, question):
    (root / "data.json").write_text(json.dumps([question | {"question_id": "q9", "question": "?"}]))
    words = ["--data", str(root), "--ckpt", str(root / "no such checkpoint"), "--out", str(root / "out")]
    with pytest.raises(ValueError, match="question q9"):
        eval_tool.main(words)


def test_missing_answers_and_answers_to_nothing_are_counted_apart(root, capsys):
    other = POINT | {"question_id": "q"}
    report = run(root, [POINT, other], {"p": "(750, 500)", "x": "(1, 1)", "y": "(2, 2)"})
    assert report["summary"]["pointing"]["problems"] == {"no answer": 1}
    assert report["answers_to_no_question"] == 2 and "2 answers belong to no question" in capsys.readouterr().out
    assert score_all([POINT], {"p": ""}, root)[0].problem == "empty"


@pytest.mark.parametrize("text", ["\ud800", "(\udfff, 1)", None, 5, [[750, 500]], {"x": "\ud800"}])
def test_answers_that_are_no_clean_text_are_read_or_fail(root, text):
    entry = run(root, [POINT], {"p": text})["summary"]["pointing"]
    assert entry["score"] == (1.0 if text == [[750, 500]] else 0.0)
    assert (root / "out/report.html").read_text(encoding="utf-8")
    assert json.loads((root / "out/predictions.json").read_text(encoding="utf-8"))


def colours(image):
    names = {tuple(int(c[i : i + 2], 16) for i in (1, 3, 5)): c for c in (TRUE, PREDICTED)}
    places = [(x, y) for x in range(image.width) for y in range(image.height)]
    return {c: [at for at in places if names.get(image.getpixel(at)) == c] for c in (TRUE, PREDICTED)}


def test_pixels_and_masks_are_drawn_where_they_are(tmp_path):
    mask = np.zeros((100, 200), dtype=np.uint8)
    mask[30:70, 120:180] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    Image.new("RGB", (200, 100)).save(tmp_path / "picture.png")
    question = POINT | {"coordinates": "pixels", "size": [200, 100]}
    found = colours(draw(question, "(50, 50)", tmp_path))
    edge = {(x, y) for x in (120, 179) for y in range(30, 70)} | {(x, y) for x in range(120, 180) for y in (30, 69)}
    assert set(found[TRUE]) == edge
    assert np.mean(found[PREDICTED], axis=0) == pytest.approx([50, 50], abs=1)


def test_a_broken_row_is_named(root):
    (root / "rows.jsonl").write_text('{"id": "a", "image": [], "conversations": []}\n')
    words = ["--data", str(root / "rows.jsonl"), "--answers", "x", "--out", str(root / "out")]
    with pytest.raises(ValueError, match="rows.jsonl:1 lacks answer"):
        eval_tool.main(words)
    (root / "rows.jsonl").write_text("{}\nno json\n"[3:])
    with pytest.raises(ValueError, match="rows.jsonl:1 is not a row"):
        eval_tool.main(words)


KINDS = [
    POINT,
    POINT | {"coordinates": "pixels", "size": [20, 10]},
    POINT | {"coordinates": "flagevalmm", "size": [20, 10]},
    POINT | {"question_type": "uvd", "answer": "(750, 500, 1.0)"},
    BOX,
    {"question_type": "trace_2d", "answer": "[(0, 0), (9, 9)]"},
    {"question_type": "trace_3d", "answer": "(1, 2, 0.3)"},
    {"question_type": "length", "answer": "3 cm", "unit": "cm"},
    {"question_type": "number", "answer": "3"},
    {"question_type": "plan", "answer": "[1, 2]"},
    {"question_type": "multiple-choice", "answer": "B"},
    {"question_type": "yes-no", "answer": "yes"},
    {"question_type": "hop", "answer": "<score>-5%</score>"},
]
PIECES = st.sampled_from(
    [
        "(",
        ")",
        "[",
        "]",
        "{",
        "}",
        ",",
        ";",
        ".",
        "-",
        "+",
        "e",
        "E",
        "%",
        "m",
        " cm",
        "\n",
        " ",
        '"',
        "x",
        "y=",
        "d",
        "0",
        "1",
        "7",
        "12",
        "500",
        "1000",
        "1e9",
        "9" * 40,
        "0.5",
        "<score>",
        "</score>",
        "<answer>",
        "</think>",
        "nan",
        "<point x=",
        "A",
        "B",
        "answer is ",
        "yes",
        "\\scalar{",
        "\\distance_unit{",
        "point_2d",
        "```",
        "\ud800",
        "\x00",
        "−",
        "（",
    ]
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(PIECES, max_size=30).map("".join) | st.text(max_size=60))
def test_any_text_gets_a_score_in_range_and_a_reason_when_it_fails(root, text):
    for question in KINDS:
        result = score(question | {"question_id": "q"}, text, root)
        assert 0.0 <= result.score <= 1.0 and np.isfinite([result.score, *result.measures.values()]).all()
        assert bool(result.failure) == bool(result.problem) and not (result.failure and result.score)


def test_numbers_are_scored_by_the_paper_and_as_released(tmp_path):
    questions = [{"question_id": str(n), "question_type": "number", "answer": "10"} for n in range(3)]
    table = summarise(score_all(questions, {"0": "9", "1": "10", "2": "about ten"}, tmp_path))["number"]
    assert table["score"] == pytest.approx((0.8 + 1.0 + 0.0) / 3)
    assert table["border_met"] == pytest.approx((0.9 + 1.0 + 0.0) / 3)


def test_a_mask_of_sixteen_bits_counts_as_its_eight_bit_version(tmp_path):
    for name, values in (("plain", np.uint8(128)), ("deep", np.uint16(128 * 257))):
        Image.fromarray(np.full((4, 4), values)).save(tmp_path / f"{name}.png")
    plain, deep = (mask_of({"question_id": "q", "mask_path": f"{name}.png"}, tmp_path) for name in ("plain", "deep"))
    assert np.array_equal(plain, deep)
