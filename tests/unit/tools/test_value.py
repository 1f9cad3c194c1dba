import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_rb.evaluation.value_scores import asked_pairs, score_questions
from megatron_rb.tools import value
from megatron_rb.value.answers import format_score
from megatron_rb.value.episodes import read_key_framed
from megatron_rb.value.hops import hop_label

HELDOUT = Path(__file__).parents[3] / "examples" / "robosim" / "heldout"


def label(out, *more):
    data = ["--data", str(HELDOUT / "lift.jsonl"), "--out", str(out), "--chunk", "1", "--pairs", "10"]
    assert value.main(["label", *data, *more]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_labels_name_pictures_that_exist(tmp_path, capsys):
    rows = label(tmp_path / "all.jsonl", "--view-dropout", "0.5")
    assert len(rows) >= 80 and len({row["id"] for row in rows}) == len(rows)
    assert all((tmp_path / path).is_file() for row in rows for path in row["image"])
    assert any("blank.png" in row["image"] for row in rows)
    assert "of 8 episodes; refused: none" in capsys.readouterr().out


def test_parts_of_several_processes_are_the_whole(tmp_path):
    whole = label(tmp_path / "all.jsonl")
    parts = [label(tmp_path / f"{k}.jsonl", "--part", f"{k}/3") for k in range(3)]
    assert sorted(row["id"] for part in parts for row in part) == sorted(row["id"] for row in whole)
    by_id = {row["id"]: row for row in whole}
    assert all(by_id[row["id"]] == row for part in parts for row in part)


def test_parts_agree_on_swapped_references(tmp_path):
    swap = ("--reference-swap", "0.75")
    whole = {row["id"]: row for row in label(tmp_path / "all.jsonl", *swap)}
    parts = [row for k in range(3) for row in label(tmp_path / f"{k}.jsonl", *swap, "--part", f"{k}/3")]
    assert {row["id"]: row for row in parts} == whole and len(parts) == len(whole)
    foreign = [row for row in whole.values() if row["episode"] not in row["image"][0]]
    assert 0.5 < len(foreign) / len(whole) < 0.8  # the first episode has nobody to swap with
    assert all(Path(row["image"][0]).parent == Path(row["image"][1]).parent for row in whole.values())
    assert all(row["episode"] in path for row in whole.values() for path in row["image"][2:])


def true_answers():
    """What a perfect model would say: progress by frame number."""
    for episode, _ in read_key_framed(HELDOUT / "lift.jsonl"):
        last = episode.key_frames[-1]
        for group in asked_pairs(list(range(last + 1))).values():
            for p, q in group:
                hop = hop_label(p / last, q / last) if p != q else 0.0
                yield {"question_id": f"{episode.name}_{p:06d}_{q:06d}", "answer": format_score(hop)}


def test_recorded_answers_become_curves_and_pictures(tmp_path, capsys):
    rows = list({row["question_id"]: row for row in true_answers()}.values())
    rows[0]["answer"] = "I cannot tell"
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["--data", str(HELDOUT / "lift.jsonl")]
    out = ["--out", str(tmp_path / "curves.jsonl"), "--interval", "1"]
    assert value.main(["score", *data, "--answers", str(tmp_path / "answers.jsonl"), *out]) == 0
    curves = [json.loads(line) for line in (tmp_path / "curves.jsonl").read_text().splitlines()]
    # the pair without an answer counts twice: as a step and from the start
    assert len(curves) == 8 and sum(curve["unreadable"] for curve in curves) == 2
    for curve in curves[1:]:
        assert curve["voc_plus"] == curve["voc_minus"] == pytest.approx(1.0)
        assert curve["curves"]["incremental"][-1] == 1.0 and curve["completion"] == "success"
        last = curve["frames"][-1]
        expected = [frame / last for frame in curve["frames"]]
        assert curve["curves"]["forward"] == pytest.approx(expected, abs=0.006)
        assert curve["curves"]["backward"][1:] == pytest.approx(expected[1:], abs=0.006)
    assert "2 of " in capsys.readouterr().out

    (tmp_path / "curves.jsonl").write_text("".join(json.dumps(curve) + "\n" for curve in curves[:2]))
    assert value.main(["plot", "--curves", str(tmp_path / "curves.jsonl"), *data, "--out", str(tmp_path / "png")]) == 0
    with Image.open(tmp_path / "png/lift_003.png") as image:
        below = np.asarray(image.convert("RGB"))[image.height * 3 // 4 :]
        assert (below != 255).any(axis=-1).mean() > 0.5  # the frames, on a white page


def test_missing_answers_count_as_unreadable(tmp_path, capsys):
    (tmp_path / "none.jsonl").write_text("")
    data = ["--data", str(HELDOUT / "stack.jsonl"), "--out", str(tmp_path / "c.jsonl"), "--interval", "5"]
    assert value.main(["score", *data, "--answers", str(tmp_path / "none.jsonl")]) == 0
    # 5 episodes of 11 or 12 frames: two frames 5 apart make one pair, asked in four ways
    assert "VOC+ 0.0000, VOC- 0.0000, 20 of 20 unreadable" in capsys.readouterr().out


def write_raw_episode(folder, shade, frames=12):
    """The released raw form: three videos, key frames, instructions one folder above."""
    av = pytest.importorskip("av")
    folder.mkdir(parents=True)
    for number, camera in enumerate(("cam_high", "cam_left_wrist", "cam_right_wrist")):
        with av.open(str(folder / f"{camera}.mp4"), "w") as container:
            stream = container.add_stream("mpeg4", rate=10)
            stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
            for frame in range(frames):
                level = shade + 40 * number + frame
                picture = av.VideoFrame.from_ndarray(np.full((32, 32, 3), level, np.uint8), format="rgb24")
                container.mux(stream.encode(picture))
            container.mux(stream.encode())
    keys = [{"anotation": "x", "start_frame_id": a, "end_frame_id": b} for a, b in ((0, 5), (5, frames - 1))]
    (folder / "annotated_keyframes.json").write_text(json.dumps(keys))
    (folder.parent / "task_instruction.json").write_text('["fold the towel"]')


def level_of(picture):
    with Image.open(picture) as image:
        return float(np.asarray(image.convert("L")).mean())


def test_videos_of_equally_named_episodes_are_not_mixed(tmp_path):
    for task, shade in (("cups", 20), ("towel", 120)):
        write_raw_episode(tmp_path / "raw" / task / "episode_001", shade)
    words = ["--data", str(tmp_path / "raw"), "--chunk", "1", "--pairs", "20", "--permuted-share", "0"]
    assert value.main(["label", *words, "--out", str(tmp_path / "out/samples.jsonl")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    assert {row["episode"] for row in rows} == {"cups/episode_001", "towel/episode_001"}
    assert len({row["id"] for row in rows}) == len(rows) > 20
    for row in rows:
        shade = {"cups": 20, "towel": 120}[row["episode"].partition("/")[0]]
        before, after = row["frames"]
        wanted = [shade, shade + 11, *(shade + 40 * n + frame for frame in (before, after) for n in range(3))]
        assert [level_of(tmp_path / "out" / path) for path in row["image"]] == pytest.approx(wanted, abs=4)


def test_a_video_that_has_changed_is_read_again(tmp_path):
    words = ["--data", str(tmp_path / "raw"), "--out", str(tmp_path / "s.jsonl"), "--chunk", "1", "--pairs", "2"]
    write_raw_episode(tmp_path / "raw" / "task" / "ep", 20)
    assert value.main(["label", *words]) == 0
    first = tmp_path / json.loads((tmp_path / "s.jsonl").read_text().splitlines()[0])["image"][0]
    assert level_of(first) == pytest.approx(20, abs=4)
    shutil.rmtree(tmp_path / "raw")
    write_raw_episode(tmp_path / "raw" / "task" / "ep", 150)
    old = first.stat().st_mtime - 100
    os.utime(first, (old, old))
    assert value.main(["label", *words]) == 0
    assert level_of(first) == pytest.approx(150, abs=4)


def test_raw_videos_are_scored_and_plotted(tmp_path):
    write_raw_episode(tmp_path / "raw" / "task" / "ep", 60)
    (scored,) = score_questions(tmp_path / "raw", 3, tmp_path / "work")
    _, frames, rows = scored
    assert frames == [0, 4, 7, 11]
    for row in rows:
        before, after = (int(part) for part in row["id"].split("_")[-2:])
        assert level_of(tmp_path / "work" / row["image"][0]) == pytest.approx(60, abs=4)
        assert level_of(tmp_path / "work" / row["image"][2]) == pytest.approx(60 + before, abs=4)
        assert level_of(tmp_path / "work" / row["image"][7]) == pytest.approx(60 + 80 + after, abs=4)
    (tmp_path / "none.jsonl").write_text("")
    data, curves = ["--data", str(tmp_path / "raw")], tmp_path / "curves.jsonl"
    assert value.main(["score", *data, "--answers", str(tmp_path / "none.jsonl"), "--out", str(curves)]) == 0
    assert value.main(["plot", *data, "--curves", str(curves), "--out", str(tmp_path / "png")]) == 0
    assert (tmp_path / "png/task/ep.png").is_file()
    assert level_of(tmp_path / "png/frames/task/ep/cam_high_000011.jpg") == pytest.approx(71, abs=4)


def test_a_video_that_ends_early_is_a_refused_episode(tmp_path, capsys):
    write_raw_episode(tmp_path / "raw" / "task" / "good", 60)
    write_raw_episode(tmp_path / "raw" / "task" / "short", 60, frames=12)
    keys = [{"start_frame_id": 0, "end_frame_id": 5}, {"start_frame_id": 5, "end_frame_id": 40}]
    (tmp_path / "raw/task/short/annotated_keyframes.json").write_text(json.dumps(keys))
    words = ["--data", str(tmp_path / "raw"), "--out", str(tmp_path / "s.jsonl"), "--chunk", "1", "--pairs", "4"]
    assert value.main(["label", *words]) == 0
    assert "of 1 episodes; refused: 1 unreadable video" in capsys.readouterr().out
    (line,) = (tmp_path / "s.ledger.jsonl").read_text().splitlines()
    assert "ends before frame" in line and "task/short" in line
    found = list(score_questions(tmp_path / "raw", 3, tmp_path / "work"))
    assert [getattr(item, "problem", "") for item in found] == ["", "unreadable video"]


def test_nothing_half_written_is_left_when_labelling_stops(tmp_path, monkeypatch):
    (tmp_path / "s.jsonl").write_text("earlier\n")
    monkeypatch.setattr("megatron_rb.data.hop_file.path_from", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        label(tmp_path / "s.jsonl")
    assert (tmp_path / "s.jsonl").read_text() == "earlier\n"


def test_two_episodes_of_one_name_are_not_scored_as_one(tmp_path, capsys):
    lines = (HELDOUT / "lift.jsonl").read_text().splitlines(True)
    first = [line for line in lines if '"lift_003/' in line]
    other = [line for line in lines if '"lift_009/' in line]
    (tmp_path / "e.jsonl").write_text("".join([*first, *other, *first]))
    (tmp_path / "none.jsonl").write_text('{"question_id": "lift_003_000000_000099", "answer": "<score>0%</score>"}\n')
    words = ["--data", str(tmp_path / "e.jsonl"), "--out", str(tmp_path / "c.jsonl"), "--interval", "3"]
    assert value.main(["score", *words, "--answers", str(tmp_path / "none.jsonl")]) == 0
    said = capsys.readouterr().out
    assert "two episodes lift_003" in said and "2 episodes (1 not scored)" in said
    assert "1 answers belong to no question" in said


def test_wrong_input_is_one_sentence(tmp_path):
    data = ["--data", str(HELDOUT / "lift.jsonl"), "--out", str(tmp_path / "c.jsonl"), "--answers", "x"]
    with pytest.raises(ValueError, match="interval of 0 frames"):
        value.main(["score", *data, "--interval", "0"])
    with pytest.raises(ValueError, match="alpha of at least 0"):
        value.main(["score", *data, "--alpha", "-1"])
    with pytest.raises(ValueError, match="part 3 of 3 does not exist"):
        label(tmp_path / "x.jsonl", "--part", "3/3")
    with pytest.raises(ValueError, match="--part one is not K/N"):
        label(tmp_path / "x.jsonl", "--part", "one")
    data, curves = ["--data", str(HELDOUT / "lift.jsonl")], tmp_path / "c.jsonl"
    for text, message in (("no json", "c.jsonl:1 is no line"), ('{"episode": "lift_003"}', "c.jsonl:1 lacks answers")):
        curves.write_text(text)
        with pytest.raises(ValueError, match=message):
            value.main(["plot", *data, "--curves", str(curves), "--out", str(tmp_path / "png")])


def test_curves_of_other_episodes_are_refused_before_a_picture_is_drawn(tmp_path):
    (tmp_path / "none.jsonl").write_text("")
    data, curves = ["--data", str(HELDOUT / "lift.jsonl")], tmp_path / "c.jsonl"
    answers = ["--answers", str(tmp_path / "none.jsonl"), "--interval", "5"]
    assert value.main(["score", *data, *answers, "--out", str(curves)]) == 0
    first, second, *_ = [json.loads(line) for line in curves.read_text().splitlines()]
    for wrong, message in (
        (second | {"episode": "elsewhere"}, "names elsewhere, which"),
        (second | {"frames": [0, 999]}, f"names frames of {second['episode']} that"),
    ):
        curves.write_text("".join(json.dumps(entry) + "\n" for entry in (first, wrong)))
        with pytest.raises(ValueError, match=message):
            value.main(["plot", *data, "--curves", str(curves), "--out", str(tmp_path / "png")])
    assert not (tmp_path / "png").exists()
