"""Files are exchanged with FlagEvalMM field by field (its adapters' `ProcessResult`, its evaluator's needs)."""

import json

import pytest
from PIL import Image

from megatron_rb.data.answer_file import read_answers
from megatron_rb.evaluation.benchmark_files import as_row, write_predictions
from megatron_rb.tools import eval as eval_tool

FIELDS = {"question_id": str, "question": str, "answer": (str, dict), "reason": str, "usage": dict}
"""`flagevalmm/models/api_response.py: ProcessResult`."""
TOKENS = {"prompt_tokens", "completion_tokens", "total_tokens"}
"""What `BaseEvaluator.statistics_tokens` reads."""

DATA = [
    {
        "question_id": 3,
        "img_path": "img/3.jpg",
        "question": "<image 1> Point at the cup.",
        "question_type": "point",
        "answer": "mask/3.png",
        "mask_path": "mask/3.png",
        "image_width": 20,
        "image_height": 10,
        "sub_task": "seen",
    },
    {
        "question_id": "b",
        "img_path": ["img/3.jpg", "img/4.jpg"],
        "question": "Which of <image 1> and <image 2> is wet?",
        "question_type": "multiple-choice",
        "options": ["the first", "the second"],
        "answer": "B",
    },
]


@pytest.fixture()
def folder(tmp_path):
    """As `tasks/where2place/process.py` leaves it, with a multiple-choice question beside."""
    for name in ("img/3.jpg", "img/4.jpg", "mask/3.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (20, 10), 255).save(tmp_path / name)
    (tmp_path / "data.json").write_text(json.dumps(DATA))
    return tmp_path


def run(folder, predictions):
    (folder / "w2p.json").write_text(json.dumps(predictions))
    words = ["--data", str(folder), "--answers", str(folder / "w2p.json"), "--out", str(folder / "out")]
    assert eval_tool.main(words) == 0
    return json.loads((folder / "out/results.json").read_text())["summary"]


def test_its_predictions_are_scored(folder):
    usage = {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13}
    table = run(
        folder,
        [
            {"question_id": "3", "question": "?", "answer": "[(500, 500)]", "reason": "", "usage": usage},
            {"question_id": "b", "question": "?", "answer": "B", "reason": "<think>x</think>", "usage": None},
        ],
    )
    assert table["pointing"]["score"] == table["multiple-choice"]["score"] == 1.0
    # an adapter's failed request counts as wrong
    table = run(
        folder, [{"question_id": "3", "question": "?", "answer": "Error code 500", "reason": "", "usage": None}]
    )
    assert table["pointing"]["score"] == 0.0 and table["pointing"]["failed"] == 1
    assert table["multiple-choice"]["failed"] == 1


def test_several_tries_at_a_question_are_averaged(folder):
    tries = {"inference_0": "A", "inference_1": "B", "inference_2": "B"}
    table = run(folder, [{"question_id": "b", "question": "?", "answer": tries, "reason": [], "usage": []}])
    assert table["multiple-choice"]["score"] == pytest.approx(2 / 3) and table["multiple-choice"]["questions"] == 3
    again = json.loads((folder / "out/predictions.json").read_text())
    assert {row["question_id"]: row["answer"] for row in again} == {"3": "", "b": tries}


def test_what_is_written_has_every_field_that_it_reads(folder):
    answers = {"3": "<think>left</think>[(1, 2)]", "b": "B"}
    write_predictions(DATA, answers, {"3": (10, 5), "b": (7, 1)}, folder / "p.json")
    rows = json.loads((folder / "p.json").read_text())
    assert len(rows) == len(DATA)
    for row in rows:
        assert row.keys() == FIELDS.keys() and all(isinstance(row[name], kind) for name, kind in FIELDS.items())
        assert row["usage"].keys() == TOKENS
        assert row["usage"]["total_tokens"] == row["usage"]["prompt_tokens"] + row["usage"]["completion_tokens"]
    assert (rows[0]["reason"], rows[0]["answer"]) == ("<think>left</think>", "[(1, 2)]")
    assert rows[1]["question"].endswith("\nA. the first\nB. the second")
    assert read_answers(folder / "p.json") == {"3": "[(1, 2)]", "b": "B"}


def test_every_question_gets_an_entry_and_nobody_invents_token_counts(folder):
    write_predictions(DATA, {"b": "B"}, {}, folder / "p.json")
    rows = json.loads((folder / "p.json").read_text())
    assert [row["answer"] for row in rows] == ["", "B"] and not any("usage" in row for row in rows)


def test_numbered_pictures_stand_where_the_text_names_them():
    row = as_row(DATA[1])
    text = row["conversations"][0]["value"]
    assert text.startswith("Which of <image> and <image> is wet?") and text.endswith("B. the second")
    assert row["image"] == ["img/3.jpg", "img/4.jpg"]
    turned = as_row(
        {"question_id": "c", "img_path": ["1", "2", "3"], "question": "<image 3> beside <image 1>, <image 3>"}
    )
    assert turned["image"] == ["2", "3", "1"]
    assert turned["conversations"][0]["value"] == "<image>\n<image> beside <image>, image 3"
    with pytest.raises(ValueError, match="shows <image 2>"):
        as_row({"question_id": "d", "img_path": "1", "question": "<image 2>?"})
