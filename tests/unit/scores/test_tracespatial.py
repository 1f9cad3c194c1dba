import json

import numpy as np
import pytest
from PIL import Image

from megatron_rb.evaluation.benchmark_files import image_paths, read_questions
from megatron_rb.scores.scoring import score, summarise
from megatron_rb.tools import eval as eval_tool

FX = 100.0
WIDTH, HEIGHT = 160, 120
CUP = (slice(50, 70), slice(40, 60))
"""Pixels of the object, 1 m away: 0.2 m across, its middle at x = -0.3 m."""


@pytest.fixture()
def bench(tmp_path):
    """One scene in the benchmark's own form: an object 1 m away, a wall at 2 m, a box to go to on the other side."""
    media = tmp_path / "raw_data"
    media.mkdir()
    Image.new("RGB", (WIDTH, HEIGHT)).save(media / "0.png")
    depth = np.full((HEIGHT, WIDTH), 2000, dtype=np.uint16)
    depth[CUP] = 1000
    Image.fromarray(depth).save(media / "0_depth.png")
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    mask[CUP] = 255
    Image.fromarray(mask).save(media / "0_mask.png")
    row = {
        "id": 7,
        "image_path": "0.png",
        "gt_depth_path": "0_depth.png",
        "mask_path": "0_mask.png",
        "gt_depth_intrinsics": [[FX, 0, 80, 0], [0, FX, 60, 0], [0, 0, 1, 0], [0, 0, 0, 1]],
        "prompt": "move the cup to the right",
        "target_object": "cup",
        "destination|direction": "right",
        "trajectory": [[-0.3, 0.0, 1.0], [0.0, 0.0, 1.0], [0.3, 0.0, 1.0]],
        "bbox_center": [0.4, 0.0, 1.0],
        "bbox_extent": [0.1, 0.1, 0.1],
        "bbox_rotation": np.eye(3).tolist(),
    }
    (tmp_path / "trajectory_dataset.json").write_text(json.dumps([row]))
    return tmp_path


def said(*points: tuple[float, float, float]) -> str:
    """Camera XYZ as an answer: u = x / z * 100 + 80 of 160 pixels."""
    parts = [
        (round((x / z * FX + 80) / WIDTH * 1000), round((y / z * FX + 60) / HEIGHT * 1000), z) for x, y, z in points
    ]
    return "[" + ", ".join(f"({u}, {v}, {d:.3f})" for u, v, d in parts) + "]"


def test_questions_are_read_as_the_benchmark_has_them(bench):
    (question,) = read_questions(bench)
    assert question["question_id"] == "7" and (bench / image_paths(question)[0]).is_file()
    assert 'for the task "move the cup to the right"' in question["question"]
    assert question["answer"] == "[(312, 500, 1.000), (500, 500, 1.000), (688, 500, 1.000)]"


def test_scores_by_hand(bench):
    (question,) = read_questions(bench)
    true = score(question, question["answer"], bench)
    assert true.score == 1.0
    assert true.measures == pytest.approx(
        {
            "start": 1,
            "end": 1,
            "no_collision": 1,
            "start_in_mask_2d": 1,
            "end_in_box_2d": 0,
            "dfd_metres": 0.0,
            "hd_metres": 0.0,
            "rmse_metres": 0.0,
        },
        abs=2e-3,
    )
    # both traces are resampled first, so fewer points on the same line are no distance
    fewer = score(question, said((-0.3, 0, 1), (0.3, 0, 1)), bench).measures
    assert fewer["dfd_metres"] == pytest.approx(0.0, abs=2e-3)
    # 0.1 m above all along
    above = score(question, said((-0.3, -0.1, 1), (0.3, -0.1, 1)), bench).measures
    assert (above["dfd_metres"], above["hd_metres"], above["rmse_metres"]) == pytest.approx((0.1, 0.1, 0.1), abs=2e-3)
    # one of the last three reaches the box, whose picture spans u = 112.0 .. 127.4 (0.35 / 1.05, 0.45 / 0.95)
    past = score(question, said((-0.3, 0, 1), (0.4, 0, 1), (0.4, 0.3, 1), (0.4, 0.5, 1)), bench)
    assert past.score == 1.0 and past.measures["end_in_box_2d"] == 1.0
    # 0.2 m past the object's edge at x = -0.21 and 0.3 from the true start
    far = score(question, said((0.02, 0, 1), (0.4, 0, 1)), bench)
    assert (far.score, far.measures["start"], far.measures["end"]) == (0.0, 0.0, 1.0)
    # through the wall: the object, which was at 1 m, is moved by 1 m to 2 m
    wall = score(question, said((-0.3, 0, 1), (0.0, 0, 2.0), (0.4, 0, 1)), bench)
    assert (wall.score, wall.measures["no_collision"]) == (0.0, 0.0)
    # behind the wall there is nothing known, so nothing is hit
    assert score(question, said((-0.3, 0, 1), (0.0, 0, 2.5), (0.4, 0, 1)), bench).measures["no_collision"] == 1.0


def test_the_object_does_not_stand_in_its_own_way(bench):
    (question,) = read_questions(bench)
    assert score(question, said((-0.3, 0, 1), (-0.29, 0, 1), (0.4, 0, 1)), bench).score == 1.0


def test_the_command_scores_recorded_answers_and_counts_what_lacks_depth(bench, tmp_path):
    for text, wanted in (
        ('[{"question_id": 7, "answer": "[(312, 500, 1.0), (687, 500, 1.0)]"}]', (1.0, 0)),
        ('[{"question_id": 7, "answer": "[(312, 500), (687, 500)]"}]', (0.0, 1)),
    ):
        (tmp_path / "said.json").write_text(text)
        words = ["--data", str(bench), "--answers", str(tmp_path / "said.json"), "--out", str(tmp_path / "out")]
        assert eval_tool.main(words) == 0
        table = json.loads((tmp_path / "out/results.json").read_text())["summary"]["trace_spatial"]
        assert (table["score"], table["failed"]) == wanted
        assert ("start" in table) == (wanted[1] == 0)  # it leaves the denominators of start and end


def test_a_trace_far_away_is_left_out_of_the_mean_distances_and_nothing_else(bench):
    (question,) = read_questions(bench)
    near = score(question, said((-0.3, 0, 1), (0.3, 0, 90)), bench)
    far = score(question, said((-0.3, 0, 1), (0.3, 0, 150)), bench)
    assert near.measures["dfd_metres"] == pytest.approx(89, abs=0.5) and "dfd_metres" not in far.measures
    assert far.score == 0.0 and far.measures["start"] == 1.0 and not far.failure
    assert score(question, said((-0.3, 0, 1), (0.3, 0, 1e300)), bench).problem == "unusable depth"


def test_start_and_end_stand_beside_their_share_of_all_answers(bench):
    (question,) = read_questions(bench)
    results = [score(question, text, bench) for text in (question["answer"], "I cannot see it", "")]
    table = summarise(results)["trace_spatial"]
    assert (table["start"], table["end"], table["score"]) == (1.0, 1.0, pytest.approx(1 / 3))
    assert table["start_of_all"] == table["end_of_all"] == pytest.approx(1 / 3) and table["failed"] == 2


def test_intrinsics_of_another_resolution_and_missing_pictures_are_told_before_anybody_is_asked(bench, tmp_path):
    words = ["--data", str(bench), "--answers", str(tmp_path / "none"), "--out", str(tmp_path / "out")]
    depth = bench / "raw_data/0_depth.png"
    whole = depth.read_bytes()
    with Image.open(depth) as picture:
        picture.resize((WIDTH // 2, HEIGHT // 2)).save(depth)
    with pytest.raises(ValueError, match=r"question 7 .*0_depth.png, the principal point \(80, 60\).*resolution"):
        eval_tool.main(words)
    depth.write_bytes(whole)
    (bench / "raw_data/0_mask.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="question 7 has no readable mask_path"):
        eval_tool.main(words)


@pytest.mark.parametrize("trajectory", [[], [[0, 0]], [[0, 0, -1.0]], [[0, 0, float("nan")]]])
def test_a_true_trace_that_cannot_be_seen_is_refused(bench, trajectory):
    rows = json.loads((bench / "trajectory_dataset.json").read_text())
    rows[0]["trajectory"] = trajectory
    (bench / "trajectory_dataset.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match="question 7 .* has a trajectory"):
        read_questions(bench)


def test_a_question_without_its_fields_is_named(bench):
    rows = json.loads((bench / "trajectory_dataset.json").read_text())
    del rows[0]["bbox_extent"]
    (bench / "trajectory_dataset.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match="question 7 .* lacks bbox_extent"):
        read_questions(bench)
