import json
from pathlib import Path

import pytest
from PIL import Image

from megatron_rb.evaluation.value_scores import asked_pairs
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

    assert value.main(["plot", "--curves", str(tmp_path / "curves.jsonl"), *data, "--out", str(tmp_path)]) == 0
    with Image.open(tmp_path / "lift_003.png") as image:
        assert image.width > 400


def test_missing_answers_count_as_unreadable(tmp_path, capsys):
    (tmp_path / "none.jsonl").write_text("")
    data = ["--data", str(HELDOUT / "stack.jsonl"), "--out", str(tmp_path / "c.jsonl"), "--interval", "5"]
    assert value.main(["score", *data, "--answers", str(tmp_path / "none.jsonl")]) == 0
    # 5 episodes of 11 or 12 frames: two frames 5 apart make one pair, asked in four ways
    assert "VOC+ 0.0000, VOC- 0.0000, 20 of 20 unreadable" in capsys.readouterr().out


def test_wrong_input_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="part 3 of 3 does not exist"):
        label(tmp_path / "x.jsonl", "--part", "3/3")
