import json
import shutil
from pathlib import Path

import pytest

from megatron_rb.bench.demo_scores import DemoRequest, demo_questions, evaluate_demo, write_demo_questions
from megatron_rb.builders.build import SampleMix, write_split

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


def test_true_answers_reach_full_marks_and_the_constant_does_not(data):
    frames = len((data / "media/heldout/episodes/lift.jsonl").read_text().splitlines())
    write_demo_questions(data, DemoRequest(5), data / "questions.jsonl")
    rows = [json.loads(line) for line in (data / "questions.jsonl").read_text().splitlines()]
    assert len(rows) == 5 + 5 + 2 * (frames - 1)
    scores = evaluate_demo(data, DemoRequest(5), {row["id"]: row["answer"] for row in rows})
    best, constant = scores["model"], scores["constant"]
    assert best["pointing_hit_rate"] == best["voc_plus"] == best["voc_minus"] == pytest.approx(1.0)
    assert best["depth_error_cm"] == 0.0 and best["unreadable"] == 0
    assert best["answers"] == len(rows)
    assert constant["unreadable"] == 0 and constant["depth_error_cm"] > 0
    assert constant["voc_plus"] + constant["voc_minus"] <= 1.0


def test_true_hops_of_the_questions_lead_from_start_to_goal(data):
    rows = demo_questions(data, DemoRequest(1)).pairs
    forward = [row for row in rows if row["id"].split("_")[-2:] == sorted(row["id"].split("_")[-2:])]
    assert all(row["hop"] >= 0 for row in forward) and forward[-1]["hop"] == 1.0
    assert all(row["hop"] <= 0 for row in rows if row not in forward) and len(forward) * 2 == len(rows)


def test_silence_scores_nothing_and_is_counted(data):
    scores = evaluate_demo(data, DemoRequest(5), {})["model"]
    assert scores["pointing_hit_rate"] == scores["voc_plus"] == scores["voc_minus"] == 0.0
    assert scores["depth_error_cm"] is None and scores["unreadable"] == scores["answers"]


def test_fewer_questions_of_fewer_episodes(data):
    some = demo_questions(data, DemoRequest(2, 1))
    assert len(some.rows) == 4 and len(some.episodes) == 1
    assert len(some.pairs) == 2 * (len(some.episodes[0].frames) - 1)
    with pytest.raises(ValueError, match="episodes is 0; it must be at least 1"):
        DemoRequest(5, 0)
