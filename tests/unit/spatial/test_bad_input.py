"""Whatever is wrong with an episode, its rows are left out with a counted reason and the others are built."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_rb.builders.build import SampleMix, build_rows, write_split
from megatron_rb.builders.episodes import read_episodes, read_mask, scan_episodes
from megatron_rb.tools import demo_data
from megatron_rb.value.episodes import BadEpisode

HELDOUT = Path(__file__).parents[3] / "examples" / "robosim" / "heldout"
TRACES = ("trace_3d", "trace_2d", "trace_object", "trace_lift")
GEOMETRIC = ("pointing", "uvd", "waypoints", "grounding", "affordance", "measuring", "multi_view", *TRACES)
EVERY = (*GEOMETRIC, "planning", "temporal_order", "hop")


@pytest.fixture()
def folder(tmp_path):
    """Two episodes; the first is to be spoilt."""
    lines = (HELDOUT / "lift.jsonl").read_text().splitlines(True)
    for name in ("lift_003", "lift_009"):
        shutil.copytree(HELDOUT / name, tmp_path / "given" / name)
    kept = (line for line in lines if "lift_003/" in line or "lift_009/" in line)
    (tmp_path / "given/lift.jsonl").write_text("".join(kept))
    return tmp_path / "given"


def spoil(folder, change):
    """Change the frames of the first episode."""
    rows = [json.loads(line) for line in (folder / "lift.jsonl").read_text().splitlines()]
    first = [row for row in rows if row["episode"] == 3]
    changed = change(first)
    rest = [row for row in rows if row["episode"] != 3]
    (folder / "lift.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*(changed or first), *rest]))


def each_view(change):
    def over_all(rows):
        for row in rows:
            for view in row["views"].values():
                change(view)

    return over_all


def built(folder, tasks=EVERY):
    episodes = [episode for episode in scan_episodes(folder) if not isinstance(episode, BadEpisode)]
    rows, report = build_rows(episodes, folder, SampleMix(tasks=tasks), seed=0)
    by_episode = {name: [row for row in rows if row["id"].startswith(name)] for name in ("lift_003", "lift_009")}
    assert by_episode["lift_009"]
    return by_episode["lift_003"], report


def halved(view):
    view["intrinsics"] = (np.array(view["intrinsics"]) * [[0.5], [0.5], [1]]).tolist()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda rows: [*rows, rows[-1]], "duplicate frames"),
        (lambda rows: rows[::-1], "unordered frames"),
        (lambda rows: rows[0].update(eef_pos=[0, float("nan"), 0]), "unusable position"),
        (lambda rows: rows[0].update(objects={"cube": [0, 0]}), "unusable position"),
        (lambda rows: rows[0].pop("phase"), "not an episode frame"),
        (lambda rows: rows[0].update(frame=float("inf")), "not an episode frame"),
        (lambda rows: rows[0].update(views=[1]), "not an episode frame"),
        (each_view(lambda view: view.update(intrinsics_size=[0, 1])), "not an episode frame"),
        (each_view(lambda view: view.update(image="nothing.jpg")), "unreadable picture"),
        (each_view(lambda view: view.update(intrinsics=[[0, 0, 0]] * 3)), "unusable camera"),
        (each_view(lambda view: view.pop("camera_to_world")), "not an episode frame"),
        (each_view(halved), "intrinsics of another resolution"),
    ],
)
def test_an_unusable_episode_is_refused_with_its_reason_and_the_next_is_built(folder, tmp_path, change, problem):
    spoil(folder, lambda rows: change(rows) if isinstance(change(list(rows)), list) else None)
    found = list(scan_episodes(folder))
    assert [getattr(episode, "problem", "") for episode in found] == [problem, ""]
    assert found[0].reason and found[0].place.endswith("lift.jsonl:1")
    with pytest.raises(ValueError, match="lift.jsonl:1"):
        read_episodes(folder)
    report = write_split(folder, tmp_path / "out", "train", SampleMix(tasks=("pointing",)), seed=0)
    assert report.refused == {problem: 1} and report.rows["pointing"] > 0
    (line,) = (tmp_path / "out/train.refused.jsonl").read_text().splitlines()
    assert json.loads(line)["problem"] == problem


def test_a_picture_that_is_shown_turned_is_refused(folder):
    picture = folder / "lift_003/00_side.jpg"
    tag = Image.Exif()
    tag[0x0112] = 6
    with Image.open(picture) as opened:
        opened.save(picture, exif=tag)
    assert [getattr(e, "problem", "") for e in scan_episodes(folder)] == ["picture turned by its EXIF tag", ""]


def test_intrinsics_whose_resolution_is_stated_are_rescaled(folder):
    rows, _ = built(folder, GEOMETRIC)

    def half(view):
        halved(view)
        view["intrinsics_size"] = [112, 112]

    spoil(folder, each_view(half))
    again, report = built(folder, GEOMETRIC)
    assert [row["answer"] for row in again] == [row["answer"] for row in rows] and not report.refused


def turned_round(view):
    pose = np.array(view["camera_to_world"])
    pose[:3, :3] = pose[:3, :3] @ np.diag([-1.0, 1.0, -1.0])
    view["camera_to_world"] = pose.tolist()


def test_what_lies_behind_the_camera_is_counted(folder):
    spoil(folder, each_view(turned_round))
    rows, report = built(folder)
    assert {row["task"] for row in rows} == {"planning", "temporal_order", "hop", "grounding", "affordance"}
    for task in ("pointing", "uvd", "waypoints", "measuring", "multi_view", "trace_3d", "trace_2d", "trace_lift"):
        assert report.skipped[f"{task}: behind the camera"] > 0


def test_nothing_is_measured_to_a_gripper_that_is_not_seen(folder):
    spoil(folder, lambda rows: [row.update(eef_pos=[0, 9, 1]) for row in rows] and None)
    rows, report = built(folder, ("measuring",))  # one cube alone is left
    assert not rows and report.skipped["measuring: gripper outside the image"] > 0


def test_what_lies_outside_the_image_is_counted(folder):
    spoil(folder, lambda rows: [row.update(eef_pos=[0, 9, 1], objects={"cube": [0, 9, 1]}) for row in rows] and None)
    rows, report = built(folder)
    assert {row["task"] for row in rows} == {"planning", "temporal_order", "hop", "grounding", "affordance"}
    for task in ("pointing", "uvd", "waypoints", "measuring", "trace_3d", "trace_2d", "trace_lift"):
        assert report.skipped[f"{task}: outside the image"] > 0


def in_every(folder, kind, change):
    for file in (folder / "lift_003").glob(f"*_{kind}*.png"):
        change(file)


def picture(values):
    return lambda file: Image.fromarray(values).save(file)


NOTHING, FAR = np.zeros((224, 224), dtype=np.uint16), np.full((224, 224), 20_000, dtype=np.uint16)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (picture(NOTHING), "no measurement (depth 0)"),
        (picture(FAR), "no measurement (depth 0)"),
        (picture(NOTHING[:100, :100]), "depth of another resolution"),
        (lambda file: file.write_bytes(b"no picture"), "depth cannot be read"),
        (lambda file: file.unlink(), "depth cannot be read"),
        (picture(np.full((224, 224), np.nan, dtype=np.float32)), None),
    ],
    ids=["zero", "far", "size", "broken", "missing", "nan"],
)
def test_depth_that_cannot_be_used_is_counted(folder, change, reason):
    before, _ = built(folder)
    if reason is None:  # a PNG holds no NaN; a TIFF does
        in_every(folder, "depth", lambda file: (change(file.with_suffix(".tiff")), file.unlink()))
        spoil(folder, each_view(lambda v: v.update(depth=v["depth"].replace(".png", ".tiff")) if v.get("depth") else 0))
        reason = "no measurement (depth 0)"
    else:
        in_every(folder, "depth", change)
    rows, report = built(folder)
    kinds = {row["task"] for row in before} - {row["task"] for row in rows}
    assert kinds == {"measuring", *TRACES}
    assert report.skipped[f"measuring: {reason}"] > 0
    assert any(key.startswith("trace_3d: no point has a usable depth") for key in report.skipped)


@pytest.mark.parametrize(("behind", "confirmed"), [(0.04, True), (0.06, False)])
def test_an_object_is_measured_only_where_its_surface_is(folder, behind, confirmed):
    """The surface of the object is moved away from its centre."""
    for frame in read_episodes(folder)[0].frames:
        for view in frame.views.values():
            if view.depth is not None and "cube" in view.masks:
                z = view.camera.project(frame.objects["cube"])[2] + behind
                Image.fromarray(np.full((224, 224), round(z * 1000), dtype=np.uint16)).save(view.depth)
    rows, report = built(folder, ("measuring",))
    assert bool(rows) is confirmed
    assert (report.skipped["measuring: depth does not confirm the object"] > 0) is not confirmed


def test_an_episode_without_depth_pictures_is_built_and_counted_as_unchecked(folder):
    spoil(folder, each_view(lambda view: view.pop("depth", None)))
    rows, report = built(folder, ("measuring", "trace_3d"))
    assert {row["task"] for row in rows} == {"measuring", "trace_3d"}
    assert report.unchecked["measuring"] >= len([row for row in rows if row["task"] == "measuring"])
    assert report.unchecked["trace_3d"] > 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda file: file.write_bytes(b"no picture"), "mask cannot be read"),
        (lambda file: Image.new("1", (100, 100), 1).save(file), "mask of another resolution"),
        (lambda file: Image.new("1", (224, 224), 0).save(file), "empty mask"),
    ],
    ids=["broken", "size", "empty"],
)
def test_masks_that_cannot_be_used_are_counted(folder, change, reason):
    in_every(folder, "mask", change)
    rows, report = built(folder, ("pointing", "uvd", "grounding", "affordance", "measuring", "multi_view"))
    assert not rows
    for task in ("pointing", "uvd", "grounding", "affordance", "measuring", "multi_view"):
        assert report.skipped[f"{task}: {reason}"] > 0


def test_one_picture_has_points_but_no_course(folder):
    spoil(folder, lambda rows: rows[:1])
    rows, report = built(folder)
    assert {row["task"] for row in rows} >= {"pointing", "uvd", "grounding", "affordance", "measuring"}
    for task in ("waypoints", "hop", "planning", "temporal_order", "trace_3d", "trace_2d", "trace_lift"):
        assert report.skipped[f"{task}: fewer than two key frames"] == 1
        assert task not in {row["task"] for row in rows}


def test_unknown_tasks_and_phases_are_not_passed_over(folder):
    spoil(
        folder,
        lambda rows: [row.update(task="fold", phase="fold it" if row["frame"] > 3 else "see") for row in rows] and None,
    )
    episodes = [episode for episode in scan_episodes(folder) if episode.name == "fold_003"]
    rows, report = build_rows(episodes, folder, SampleMix(tasks=("affordance", "planning")), seed=0)
    assert report.skipped == {"affordance: which object the task fold grasps is not known": 1}
    assert json.loads(next(row["answer"] for row in rows if "remaining" in row["id"])) == ["see", "fold it"]


def test_a_camera_that_moves_is_checked_against_its_own_depth_pictures(folder):
    """The camera shifts by 2 cm a frame; a depth picture shows the gripper where its own camera sees it."""

    def move(rows):
        for index, row in enumerate(rows):
            pose = np.array(row["views"]["side"]["camera_to_world"])
            pose[:3, 3] += pose[:3, 0] * 0.02 * index
            row["views"]["side"]["camera_to_world"] = pose.tolist()

    spoil(folder, move)
    for frame in read_episodes(folder)[0].frames:
        u, v, z = frame.views["side"].camera.project(frame.eef_position)
        depth = np.full((224, 224), 5000, dtype=np.uint16)
        depth[int(v) - 1 : int(v) + 2, int(u) - 1 : int(u) + 2] = round(z * 1000)
        Image.fromarray(depth).save(frame.views["side"].depth)
    rows, report = built(folder, ("trace_3d",))
    assert len(rows) == 4 and not any("gate" in key for key in report.skipped)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 255), (3, 250)])
def test_masks_of_any_two_greys_are_read(tmp_path, low, high):
    values = np.full((40, 40), low, dtype=np.uint8)
    values[10:20, 5:35] = high
    Image.fromarray(values).save(tmp_path / "mask.png")
    assert (read_mask(tmp_path / "mask.png") == (values == high)).all()


def test_the_command_says_what_it_left_out(folder, tmp_path, capsys):
    spoil(folder, lambda rows: [*rows, rows[-1]])
    for split in ("train", "heldout"):
        shutil.copytree(folder, tmp_path / "episodes" / split)
    words = ["--episodes", str(tmp_path / "episodes"), "--out", str(tmp_path / "out"), "--windows", "0"]
    assert demo_data.main([*words, "--tasks", "trace_2d", "--answer-form", "2.0", "--answer-size", "448", "224"]) == 0
    said = capsys.readouterr().out
    assert "refused episodes: 1 duplicate frames" in said and "not checked by depth: 4 trace_2d" in said
    row = json.loads((tmp_path / "out/train.jsonl").read_text().splitlines()[0])
    assert row["points"]["frame"] == "pixels" and row["points"]["size"] == [448, 224]
    with pytest.raises(ValueError, match="lies in"):
        write_split(folder, folder / "out", "train", SampleMix(), seed=0)
    assert demo_data.main([*words, "--tasks", "uvd", "--answer-form", "2.0"]) == 2
    assert "leave out the tasks uvd" in capsys.readouterr().err
