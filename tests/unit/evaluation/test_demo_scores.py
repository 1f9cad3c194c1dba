import json
import shutil
from pathlib import Path

import pytest

from megatron_rb.evaluation.demo_scores import evaluate_demo
from megatron_rb.spatial.builders import SampleMix, write_split
from megatron_rb.value.answers import format_score
from megatron_rb.value.hops import hop_label

HELDOUT = Path(__file__).parents[3] / "examples" / "robosim" / "heldout"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("demo")
    for split, episode in (("train", "lift_003"), ("heldout", "lift_009")):
        folder = root / "episodes" / split
        shutil.copytree(HELDOUT / episode, folder / episode)
        lines = (HELDOUT / "lift.jsonl").read_text().splitlines()
        (folder / "lift.jsonl").write_text("\n".join(line for line in lines if f'"{episode}/' in line))
        write_split(folder, root / "data", split, SampleMix(tasks=("pointing", "uvd", "hop")), seed=0)
    return root / "data"


def true_answers(rows, last=7):
    heldout = (json.loads(line) for line in (Path(rows[0]["root"]) / "heldout.jsonl").read_text().splitlines())
    known = {row["id"]: row["answer"] for row in heldout}
    for row in rows:
        if row["id"].startswith("voc_"):
            p, q = (int(part) for part in row["id"].split("_")[-2:])
            known[row["id"]] = format_score(hop_label(p / last, q / last))
    return {row["id"]: known[row["id"]] for row in rows}


def test_true_answers_reach_full_marks_and_the_constant_does_not(data):
    frames = len((data / "media/heldout/episodes/lift.jsonl").read_text().splitlines())

    def answer(rows):
        return true_answers([row | {"root": str(data)} for row in rows], last=frames - 1)

    scores = evaluate_demo(data, 5, answer)
    best, constant = scores["model"], scores["constant"]
    assert best["pointing_hit_rate"] == best["voc_plus"] == best["voc_minus"] == pytest.approx(1.0)
    assert best["depth_error_cm"] == 0.0 and best["unreadable"] == 0
    assert best["answers"] == 5 + 5 + 2 * (frames - 1)
    assert constant["unreadable"] == 0 and constant["depth_error_cm"] > 0
    assert constant["voc_plus"] + constant["voc_minus"] <= 1.0


def test_silence_scores_nothing_and_is_counted(data):
    scores = evaluate_demo(data, 5, lambda rows: {})["model"]
    assert scores["pointing_hit_rate"] == scores["voc_plus"] == scores["voc_minus"] == 0.0
    assert scores["depth_error_cm"] is None and scores["unreadable"] == scores["answers"]
