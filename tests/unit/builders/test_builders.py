import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_rb.builders.build import SampleMix, build_rows, visible_point, write_split
from megatron_rb.builders.episodes import read_depth, read_episodes, read_mask
from megatron_rb.spatial.answers import parse_points, parse_points_with_depth
from megatron_rb.spatial.points import ImageSize, grid_to_pixels, pixel_index
from megatron_rb.spatial.values import Points, Unit
from megatron_rb.value.answers import parse_score

ROOT = Path(__file__).parents[3] / "examples" / "robosim"


@pytest.fixture(scope="module")
def episodes():
    return read_episodes(ROOT / "heldout")


@pytest.fixture(scope="module")
def built(episodes):
    return build_rows(episodes, ROOT, SampleMix(), seed=0)


def rows_of(built, task):
    return [row for row in built[0] if row["task"] == task]


def test_held_out_episodes_are_not_trained_on(episodes):
    train = {episode.name for episode in read_episodes(ROOT / "train")}
    assert not train & {episode.name for episode in episodes}


def test_key_frames_are_the_phase_changes(episodes):
    lift = next(episode for episode in episodes if episode.task == "lift")
    phases = [lift.frames[i].phase for i in lift.key_frames()]
    assert phases == ["approach", "descend", "grasp", "lift", "lift"]


def test_pointing_answers_lie_on_the_object(built):
    rows = rows_of(built, "pointing")
    for row in rows:
        mask = read_mask(ROOT / row["mask"])
        size = ImageSize(mask.shape[1], mask.shape[0])
        answer = parse_points(row["conversations"][1]["value"]).points
        assert mask[pixel_index(grid_to_pixels(answer, size), size)].all(), row["id"]
    assert len(rows) > 150


def test_depth_of_a_centre_lies_just_behind_the_measured_surface(episodes):
    gaps = []
    for frame in next(e for e in episodes if e.name == "lift_003").frames:
        view = frame.views["side"]
        point, _ = visible_point(view, "cube", frame.objects["cube"])
        gaps.append(point[2] - read_depth(view.depth)[pixel_index(point[:2], view.camera.size)])
    assert 0.0 < np.median(gaps) < 0.04


def test_points_with_depth_lead_back_to_the_object(episodes):
    frame = next(e for e in episodes if e.name == "lift_003").frames[0]
    rows, _ = build_rows([episodes[0]], ROOT, SampleMix(tasks=("uvd",)), seed=0)
    camera = frame.views["side"].camera
    u, v, d = parse_points_with_depth(rows[0]["answer"]).points[0]
    pixel = grid_to_pixels(np.array([u, v]), camera.size)
    world = camera.camera_to_world_points(camera.back_project(np.array([*pixel, d])))
    np.testing.assert_allclose(world, frame.objects["cube"], atol=2e-3)


def test_waypoints_run_from_now_to_the_end(built):
    row = rows_of(built, "waypoints")[0]
    assert row["points"]["end effector"] == parse_points_with_depth(row["answer"]).points.tolist()
    assert len(row["points"]["end effector"]) == 5  # a lift has four phases


def test_nine_key_frames_become_eight_waypoints_that_still_reach_the_end(episodes):
    stack = next(e for e in episodes if e.name == "stack_008")
    assert len(stack.key_frames()) == 9
    row = build_rows([stack], ROOT, SampleMix(tasks=("waypoints",)), seed=0)[0][0]
    points = Points(parse_points_with_depth(row["answer"]).points, Unit.GRID)
    assert len(points) == 8
    world = points.in_world(stack.frames[0].views["side"].camera)
    np.testing.assert_allclose(world[0], stack.frames[0].eef_position, atol=3e-3)
    np.testing.assert_allclose(world[-1], stack.frames[-1].eef_position, atol=3e-3)


def test_depth_has_three_decimals_and_places_are_whole_numbers(built):
    answers = [row["answer"] for task in ("uvd", "waypoints") for row in rows_of(built, task)]
    tuple_3d = r"\(\d{1,4}, \d{1,4}, \d\.\d{3}\)"
    assert answers and all(re.fullmatch(rf"\[{tuple_3d}(, {tuple_3d})*\]", answer) for answer in answers)


def test_hop_answers_match_their_label_and_pictures(built):
    for row in rows_of(built, "hop"):
        assert parse_score(row["answer"]).hop == pytest.approx(row["hop"], abs=0.00501)
        assert row["conversations"][0]["value"].count("<image>") == len(row["image"]) == 2


def test_references_and_second_view_add_pictures(episodes):
    mix = SampleMix(tasks=("hop",), hop_views=("front", "side"), hop_references=True, hops_per_episode=2)
    rows, report = build_rows(episodes, ROOT, mix, seed=0)
    assert {len(row["image"]) for row in rows} == {8}
    assert "REF-START front: <image>" in rows[0]["conversations"][0]["value"]
    assert report.skipped["hop: a state lacks one of the views front, side"] > 0


def test_hidden_and_covered_objects_are_counted_not_built(built):
    _, report = built
    assert report.skipped["pointing: hidden"] == 2
    assert report.skipped["pointing: centre covered by something nearer"] == 10


def test_same_seed_gives_the_same_rows(episodes, built):
    again, _ = build_rows(episodes, ROOT, SampleMix(), seed=0)
    assert json.dumps(again) == json.dumps(built[0])


def test_media_root_must_hold_the_pictures(episodes):
    with pytest.raises(ValueError, match="media root"):
        build_rows(episodes[:1], ROOT / "train", SampleMix(), seed=0)


def test_unknown_task_is_refused(episodes):
    with pytest.raises(ValueError, match="unknown tasks"):
        build_rows(episodes, ROOT, SampleMix(tasks=("grasping",)), seed=0)


def test_folder_without_episodes_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no .jsonl"):
        read_episodes(tmp_path)
    (tmp_path / "a.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="a.jsonl:1"):
        read_episodes(tmp_path)


def test_windows_move_the_point_and_keep_the_depth(episodes, tmp_path):
    shutil.copytree(ROOT / "heldout" / "lift_003", tmp_path / "lift_003")
    line = (ROOT / "heldout" / "lift.jsonl").read_text().splitlines()[0]
    (tmp_path / "lift.jsonl").write_text(line + "\n")
    mix = SampleMix(tasks=("uvd",), windows=5, window_side=96)
    rows, _ = build_rows(read_episodes(tmp_path), tmp_path, mix, seed=0)
    answers = np.array([parse_points_with_depth(row["answer"]).points[0] for row in rows])
    assert len(rows) == 5 and len({tuple(point) for point in answers[:, :2]}) > 1 and len(set(answers[:, 2])) == 1
    for row, answer in zip(rows, answers, strict=True):
        mask = read_mask(tmp_path / row["mask"])
        assert mask.shape == (96, 96)
        assert mask[pixel_index(grid_to_pixels(answer[:2], ImageSize(96, 96)), ImageSize(96, 96))]


def test_window_must_fit_into_the_picture(episodes, tmp_path):
    with pytest.raises(ValueError, match="does not fit"):
        build_rows(episodes[:1], ROOT, SampleMix(tasks=("pointing",), windows=1, window_side=300), seed=0)


def test_written_split_stands_alone(tmp_path):
    report = write_split(ROOT / "heldout", tmp_path, "heldout", SampleMix(tasks=("pointing", "hop"), windows=1), seed=0)
    rows = [json.loads(line) for line in (tmp_path / "heldout.jsonl").read_text().splitlines()]
    assert report.rows.total() == len(rows) == len({row["id"] for row in rows})
    assert all(
        (tmp_path / path).is_file() for row in rows for path in [*row["image"], *filter(None, [row.get("mask")])]
    )
