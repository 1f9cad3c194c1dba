import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_rb.builders.build import SampleMix, build_rows
from megatron_rb.builders.episodes import read_episodes
from megatron_rb.evaluation.html_report import PREDICTED, TRUE, draw
from megatron_rb.scores.scoring import score, summarise
from megatron_rb.spatial.points import ImageSize
from megatron_rb.tools import eval as eval_tool

HELDOUT = Path(__file__).parents[3] / "examples" / "robosim" / "heldout"
TASKS = ("pointing", "uvd", "grounding", "trace_2d", "trace_3d", "measuring", "planning", "hop")


@pytest.fixture(scope="module")
def rows():
    return build_rows(read_episodes(HELDOUT)[:1], HELDOUT, SampleMix(tasks=TASKS), seed=0)[0]


def evaluate(rows, answers, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text(
        "".join(
            json.dumps(
                row
                | {"image": [str(HELDOUT / p) for p in row["image"]]}
                | ({"mask": str(HELDOUT / row["mask"])} if "mask" in row else {})
            )
            + "\n"
            for row in rows
        )
    )
    said = tmp_path / "said.json"
    said.write_text(json.dumps([{"question_id": key, "answer": text} for key, text in answers.items()]))
    arguments = ["--data", str(data), "--answers", str(said), "--out", str(tmp_path / "out")]
    assert eval_tool.main(arguments) == 0
    return json.loads((tmp_path / "out/results.json").read_text())["summary"]


def test_true_answers_score_full_and_the_report_shows_them(rows, tmp_path):
    summary = evaluate(rows, {row["id"]: row["answer"] for row in rows}, tmp_path)
    assert set(summary) == {"pointing", "uvd", "box", "trace_2d", "trace_3d", "length", "plan", "hop"}
    assert all(entry["score"] == 1.0 and entry["failed"] == 0 for entry in summary.values())
    assert summary["trace_3d"]["dfd"] == summary["trace_3d"]["depth_error_cm"] == 0.0
    assert summary["hop"]["hop_error_percent"] <= 0.51
    page = (tmp_path / "out/report.html").read_text()
    assert page.count("<figure>") > 20 and "data:image/png;base64" in page
    # what was written can be read again as FlagEvalMM's files
    again = tmp_path / "again"
    files = ["--data", str(tmp_path / "out/data.json"), "--answers", str(tmp_path / "out/predictions.json")]
    assert eval_tool.main([*files, "--out", str(again)]) == 0
    assert json.loads((again / "results.json").read_text())["summary"] == summary


def test_rows_of_version_2_0_are_scored_in_their_pixels(tmp_path):
    mix = SampleMix(
        tasks=("pointing", "grounding", "trace_2d", "multi_view"),
        version="2.0",
        views=("side",),
        answer_size=ImageSize(448, 224),
    )
    rows = build_rows(read_episodes(HELDOUT)[:1], HELDOUT, mix, seed=0)[0]
    assert {row["task"] for row in rows} == set(mix.tasks)
    summary = evaluate(rows, {row["id"]: row["answer"] for row in rows}, tmp_path)
    assert all(entry["score"] == 1.0 and entry["failed"] == 0 for entry in summary.values())
    # the same answers taken for 0-1000 would lie elsewhere
    for row in rows:
        row["points"]["frame"] = "0-1000"
    summary = evaluate(rows, {row["id"]: row["answer"] for row in rows}, tmp_path)
    assert summary["pointing"]["score"] < 0.5


BAD = [
    "I think it is on the left.",
    "[(12, 34), (5,",
    "",
    "(" * 5000,
    "1, " * 400_000,
    "import os\nprint(os.getcwd())",
    "[(1e400, nan)]",
    "<score>",
    "\x00\ud7ff",
    "[(5000, 3, -1)]",
    "<answer></answer>",
    "\ud800",
    "[" * 90_000,
    "(" + "9" * 90_000,
]


@pytest.mark.parametrize("text", BAD, ids=range(len(BAD)))
def test_no_answer_crashes_and_failures_are_counted_as_wrong(rows, text, tmp_path):
    rows = [row for task in TASKS for row in [row for row in rows if row["task"] == task][:2]]
    summary = evaluate(rows, {row["id"]: text for row in rows}, tmp_path)
    assert sum(entry["questions"] for entry in summary.values()) == 2 * len(TASKS)
    for kind, entry in summary.items():
        assert entry["score"] == 0.0, kind
        assert kind == "plan" or entry["failed"] == entry["questions"], kind
        assert kind == "plan" or sum(entry["problems"].values()) == entry["questions"]


def test_missing_answers_are_failures(rows, tmp_path):
    half = {row["id"]: row["answer"] for row in rows[::2]}
    summary = evaluate(rows, half, tmp_path)
    assert sum(entry["failed"] for entry in summary.values()) == len(rows) - len(half)


def test_scores_by_hand(tmp_path):
    mask = np.zeros((10, 20), dtype=bool)
    mask[:, 10:] = True
    Image.fromarray(mask).save(tmp_path / "mask.png")
    question = {"question_id": "a", "mask_path": "mask.png"}
    pointing = question | {"question_type": "pointing"}
    assert score(pointing, "[(600, 5), (100, 5)]", tmp_path).score == 0.5
    uvd = score(question | {"question_type": "uvd", "answer": "[(600, 5, 1.250)]"}, "(600, 5, 1.2)", tmp_path)
    assert uvd.score == 1.0 and uvd.measures["depth_error_cm"] == pytest.approx(5.0)
    box = {"question_id": "b", "question_type": "box", "answer": "[0, 0, 200, 200]"}
    results = [score(box, text, tmp_path) for text in ("[100, 0, 300, 200]", "[0, 0, 200, 200]", "none")]
    assert [result.score for result in results] == [pytest.approx(1 / 3), 1.0, 0.0]
    table = summarise(results)["box"]
    assert table["iou@0.5"] == pytest.approx(1 / 3) and table["failed"] == 1
    assert table["score"] == pytest.approx(4 / 9)
    trace = {"question_id": "c", "question_type": "trace_2d", "answer": "[(0, 0), (1000, 0)]"}
    measures = score(trace, "[(0, 300), (1000, 300)]", tmp_path).measures
    assert measures == pytest.approx({"dfd": 0.3, "hd": 0.3, "rmse": 0.3, "rmse_resampled": 0.3})
    choice = {"question_id": "d", "question_type": "multiple-choice", "answer": "B"}
    assert [score(choice, text, tmp_path).score for text in ("(B)", "A", "B or C?", "The answer is B")] == [1, 0, 0, 1]
    number = {"question_id": "n", "question_type": "number", "answer": "100"}
    said = [score(number, text, tmp_path) for text in ("112", "There are 1,000.", "2 or 3", "many")]
    assert [result.score for result in said] == [pytest.approx(0.8), 0.0, 0.0, 0.0]
    assert [bool(result.failure) for result in said] == [False, False, True, True]
    hop = {"question_id": "e", "question_type": "hop", "hop": -0.25, "answer": "<score>-25%</score>"}
    said = score(hop, "<score>-5%</score>", tmp_path)
    assert said.score == 1.0 and said.measures["hop_error_percent"] == pytest.approx(20.0)


def test_points_are_drawn_where_they_are(tmp_path):
    Image.new("RGB", (100, 50)).save(tmp_path / "a.png")
    question = {"question_id": "a", "question_type": "pointing", "img_path": "a.png", "answer": "[(200, 500)]"}
    image = draw(question, "[(800, 500)]", tmp_path)
    colours = {tuple(int(c[i : i + 2], 16) for i in (1, 3, 5)): c for c in (TRUE, PREDICTED)}
    found = {
        colours[image.getpixel((x, y))]: x for x in range(100) for y in range(50) if image.getpixel((x, y)) in colours
    }
    assert abs(found[TRUE] - 24) <= 1 and abs(found[PREDICTED] - 84) <= 1


def test_wrong_files_are_one_sentence(tmp_path):
    (tmp_path / "data.json").write_text('[{"question_id": 1, "question": "?"}, {"question_id": 1, "question": "?"}]')
    with pytest.raises(ValueError, match="'1' more than once"):
        eval_tool.main(["--data", str(tmp_path), "--answers", "x", "--out", str(tmp_path / "out")])
    (tmp_path / "data.json").write_text("[1, 2")
    with pytest.raises(ValueError, match="data.json is not JSON"):
        eval_tool.main(["--data", str(tmp_path), "--answers", "x", "--out", str(tmp_path / "out")])
    with pytest.raises(ValueError, match="no file gone.png"):
        eval_tool.main(["--data", "x", "--answers", "x", "--out", str(tmp_path / "out"), "--curves", "gone.png"])
    with pytest.raises(ValueError, match="question_type 'poem'"):
        score({"question_id": "q", "question_type": "poem"}, "", tmp_path)
