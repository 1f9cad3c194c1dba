import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_rb.builders.build import SampleMix, build_rows
from megatron_rb.builders.episodes import read_episodes, read_mask
from megatron_rb.data.ground_truth import check_points
from megatron_rb.spatial.answers import parse_box, parse_points, parse_points_with_depth
from megatron_rb.spatial.depth import DepthGate
from megatron_rb.spatial.points import ImageSize
from megatron_rb.spatial.text_answers import parse_length
from megatron_rb.spatial.values import Points, Unit

ROOT = Path(__file__).parents[3] / "examples" / "robosim" / "heldout"
EPISODES = [episode for episode in read_episodes(ROOT) if episode.name in ("lift_003", "stack_002")]


def build(task, **options):
    return build_rows(EPISODES, ROOT, SampleMix(tasks=(task,), **options), seed=0)


def episode_of(row):
    return next(episode for episode in EPISODES if row["id"].startswith(episode.name))


@pytest.mark.parametrize("task", ["grounding", "affordance"])
@pytest.mark.parametrize("version", ["2.5", "2.0"])
def test_boxes_cover_their_mask_in_the_unit_of_the_version(task, version):
    shown = ImageSize(448, 224) if version == "2.0" else None
    rows, _ = build(task, version=version, answer_size=shown)
    assert rows
    for row in rows:
        check_points(row)
        box = parse_box(row["answer"], shown).box.reshape(2, 2)
        points = Points(box, Unit.PIXELS, shown) if shown else Points(box, Unit.GRID)
        (x1, y1), (x2, y2) = points.in_pixels(ImageSize(224, 224)).values
        rows_of_mask, columns = np.nonzero(read_mask(ROOT / row["mask"]))
        assert abs(columns.min() - x1) < 1.1 and abs(columns.max() + 1 - x2) < 1.1
        assert abs(rows_of_mask.min() - y1) < 1.1 and abs(rows_of_mask.max() + 1 - y2) < 1.1


def test_affordance_stops_when_the_cube_is_grasped():
    rows, _ = build("affordance")
    for row in rows:
        frame = int(row["id"].split("_")[2])
        assert episode_of(row).frames[frame].phase in ("approach", "descend")
        assert "possible affordance area" in row["conversations"][0]["value"]


def test_measured_lengths_are_those_of_the_simulator():
    rows, report = build("measuring")
    units = set()
    for row in rows:
        question = row["conversations"][0]["value"]
        frame = episode_of(row).frames[int(row["id"].split("_")[2])]
        places = {
            "gripper": frame.eef_position,
            "red cube": frame.objects.get("cube", frame.objects.get("cubeA")),
            "green cube": frame.objects.get("cubeB"),
        }
        a, b = (places[name] for name in places if f"the {name}" in question)
        units.add(row["answer"].split()[1])
        assert parse_length(row["answer"]).metres == pytest.approx(np.linalg.norm(a - b), abs=0.0015)
    assert units == {"m", "cm", "inch"}
    assert report.unchecked["measuring"] == 0, "both episodes have depth in every side view"


def test_traces_pass_near_every_position_of_the_gripper():
    rows, _ = build("trace_3d")
    assert rows
    for row in rows:
        points = parse_points_with_depth(row["answer"])
        assert 2 <= len(points.points) <= 8
        first = int(row["id"].split("_")[2])
        camera = episode_of(row).frames[first].views["side"].camera
        world = Points(points.points, Unit.GRID).in_world(camera)
        frames = episode_of(row).frames
        np.testing.assert_allclose(world[0], frames[first].eef_position, atol=3e-3)
        np.testing.assert_allclose(world[-1], frames[-1].eef_position, atol=3e-3)


def test_the_trace_of_the_object_follows_it_from_where_it_is_seen():
    rows, report = build("trace_object")
    assert {row["id"][:5] for row in rows} == {"lift_", "stack"}
    for row in rows:
        points = parse_points_with_depth(row["answer"]).points
        assert 2 <= len(points) <= 8 and "object-centric visual trace" in row["conversations"][0]["value"]
        episode, first = episode_of(row), int(row["id"].split("_")[2])
        name = "cube" if episode.task == "lift" else "cubeA"
        view = episode.frames[first].views["side"]
        world = Points(points, Unit.GRID).in_world(view.camera)
        assert np.linalg.norm(world - world[0], axis=1).max() > 0.015
        np.testing.assert_allclose(world[0], episode.frames[first].objects[name], atol=3e-3)
        np.testing.assert_allclose(world[-1], episode.frames[-1].objects[name], atol=3e-3)
        u, v = Points(points[:1], Unit.GRID).in_pixels(ImageSize(224, 224)).values[0, :2]
        assert view.mask(name)[int(v), int(u)]
    assert report.skipped["trace_object: the object does not move any more"] > 0  # it has been put down
    refused, report = build_rows([replace(EPISODES[0], task="fold")], ROOT, SampleMix(tasks=("trace_object",)), seed=0)
    assert not refused and report.skipped["trace_object: which object the task fold moves is not known"] == 1


def test_three_kinds_of_trace_rows_tell_the_same_way():
    solid, flat, lifted = (build(task)[0] for task in ("trace_3d", "trace_2d", "trace_lift"))
    assert len(solid) == len(flat) == len(lifted)
    for a, b, c in zip(solid, flat, lifted, strict=True):
        points = parse_points_with_depth(a["answer"]).points
        assert parse_points(b["answer"]).points.tolist() == points[:, :2].tolist()
        assert c["answer"] == a["answer"] and b["answer"] in c["conversations"][0]["value"]


def test_version_2_0_traces_are_pixels_of_the_shown_size():
    grid, pixels = build("trace_2d")[0], build("trace_2d", version="2.0", answer_size=ImageSize(448, 224))[0]
    for a, b in zip(grid, pixels, strict=True):
        check_points(b)
        assert b["points"]["frame"] == "pixels" and b["points"]["size"] == [448, 224]
        expected = Points(parse_points(a["answer"]).points, Unit.GRID).in_pixels(ImageSize(448, 224)).values
        shown = parse_points(b["answer"], ImageSize(448, 224)).points
        assert np.abs(shown - expected).max() <= 1.0
        assert "up to 10 key trajectory points" in b["conversations"][0]["value"]


def test_depth_gate_refuses_what_the_depth_pictures_contradict():
    strict, report = build("trace_3d", gate=DepthGate(tolerance=1e-4))
    assert not strict and report.skipped["trace_3d: depth gate"] + report.skipped["trace_3d: hidden gate"] > 0
    free, report = build_rows(read_episodes(ROOT)[1:2], ROOT, SampleMix(tasks=("trace_3d",)), seed=0)
    assert free and report.unchecked["trace_3d"] == len(free)


def test_the_second_view_shows_the_same_object():
    rows, _ = build("multi_view")
    assert rows
    for row in rows:
        assert len(row["image"]) == 2 and "front" in row["image"][0] and "side" in row["image"][1]
        (x, y) = Points(parse_points(row["answer"]).points, Unit.GRID).in_pixels(ImageSize(224, 224)).values[0]
        assert read_mask(ROOT / row["mask"])[int(y), int(x)]


def test_plans_shrink_step_by_step():
    rows = [row for row in build("planning")[0] if row["id"].startswith("lift_003") and "remaining" in row["id"]]
    plans = [json.loads(row["answer"]) for row in rows]
    assert plans[0] == [
        "move the gripper over the red cube",
        "lower the gripper to the red cube",
        "close the gripper on the red cube",
        "lift the red cube",
    ]
    assert plans[1:] == [plans[0][i:] for i in range(1, len(plans))]


def test_the_given_order_sorts_the_pictures():
    for row in build("temporal_order")[0]:
        order = json.loads(row["answer"])
        frames = [int(Path(row["image"][number - 1]).name.split("_")[0]) for number in order]
        assert frames == sorted(frames) and sorted(order) == list(range(1, len(order) + 1))
        assert len(order) == min(6, len(episode_of(row).key_frames()))


def test_version_2_0_pointing_is_in_pixels():
    rows, _ = build("pointing", version="2.0")
    for row in rows:
        check_points(row)
        x, y = parse_points(row["answer"], ImageSize(224, 224)).points[0].astype(int)
        assert read_mask(ROOT / row["mask"])[y, x] and row["points"]["size"] == [224, 224]
    with pytest.raises(ValueError, match="version '3'"):
        SampleMix(version="3")
