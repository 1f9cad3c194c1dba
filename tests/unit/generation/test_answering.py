import argparse
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from megatron_rb.config.schema import DataConfig
from megatron_rb.evaluation.benchmark_files import read_questions
from megatron_rb.evaluation.evaluate import load_benchmark
from megatron_rb.generation.answer_source import answers_of, shown_size
from megatron_rb.generation.answering import answer_all
from megatron_rb.generation.questions import Questions
from megatron_rb.scores.scoring import score
from megatron_rb.tools import demo_data, demo_model

HELDOUT = Path(__file__).parents[3] / "examples" / "robosim" / "heldout"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Rows about one episode and a tiny model folder for its tokenizer."""
    root = tmp_path_factory.mktemp("answering")
    for split in ("train", "heldout"):
        folder = root / "episodes" / split
        shutil.copytree(HELDOUT / "lift_003", folder / "lift_003")
        lines = (HELDOUT / "lift.jsonl").read_text().splitlines()
        (folder / "lift.jsonl").write_text("\n".join(line for line in lines if '"lift_003/' in line))
    data = root / "data"
    demo_data.main(["--episodes", str(root / "episodes"), "--out", str(data), "--tasks", "uvd", "--windows", "0"])
    assert demo_model.main(["--texts", str(data / "train.jsonl"), "--out", str(root / "hf")]) == 0
    rows = [json.loads(line) for line in (data / "heldout.jsonl").read_text().splitlines()]
    return data, root / "hf", rows


def counting(calls):
    def generate(prompts, decode, eos_ids):
        calls.append([decode(prompt.input_ids.tolist()) for prompt in prompts])
        return [f"answer {prompt.sample_id}" for prompt in prompts]

    return generate


def test_a_stopped_run_asks_only_what_is_missing(made, tmp_path):
    data, hf, rows = made
    out, calls = tmp_path / "answers.jsonl", []
    first = answer_all(Questions(rows[:3], data, out), str(hf), counting(calls), DataConfig())
    out.write_text(out.read_text() + '{"question_id": "half')  # the process died while it wrote
    everything = answer_all(Questions(rows, data, out), str(hf), counting(calls), DataConfig())
    assert [len(call) for call in calls] == [3, len(rows) - 3]
    assert everything.keys() == {row["id"] for row in rows} and first.items() <= everything.items()
    assert all(text == f"answer {key}" for key, text in everything.items())
    assert (
        answer_all(Questions(rows, data, out), str(hf), counting(calls), DataConfig()) == everything and len(calls) == 2
    )


def test_the_answer_is_not_shown_and_the_system_prompt_is_that_of_the_settings(made, tmp_path):
    data, hf, rows = made
    calls = []
    answer_all(
        Questions(rows[:1], data, tmp_path / "a.jsonl"), str(hf), counting(calls), DataConfig(system_prompt="Be brief.")
    )
    assert "Be brief." in calls[0][0] and rows[0]["answer"] not in calls[0][0]


def test_an_unreadable_picture_gives_no_answer_and_a_ledger_line(made, tmp_path):
    data, hf, rows = made
    broken = rows[0] | {"id": "broken", "image": ["missing.jpg"]}
    answers = answer_all(Questions([broken, rows[1]], data, tmp_path / "a.jsonl"), str(hf), counting([]), DataConfig())
    assert answers.keys() == {rows[1]["id"]}
    assert "missing.jpg" in (tmp_path / "a.ledger.jsonl").read_text()
    # nothing but that question is left now, and that is no error
    assert (
        answer_all(Questions([broken, rows[1]], data, tmp_path / "a.jsonl"), str(hf), counting([]), DataConfig())
        == answers
    )


def test_a_picture_that_breaks_off_gives_no_answer_and_the_others_go_on(made, tmp_path):
    data, hf, rows = made
    whole = (data / rows[0]["image"][0]).read_bytes()
    (tmp_path / "torn.jpg").write_bytes(whole[: len(whole) // 2])
    torn = rows[0] | {"id": "torn", "image": [str(tmp_path / "torn.jpg")]}
    answers = answer_all(Questions([torn, rows[1]], data, tmp_path / "a.jsonl"), str(hf), counting([]), DataConfig())
    assert answers.keys() == {rows[1]["id"]} and "unreadable" in (tmp_path / "a.ledger.jsonl").read_text()


def test_an_evaluation_in_which_nothing_can_be_asked_stops(made, tmp_path):
    _, hf, rows = made
    (tmp_path / "torn.jpg").write_bytes(b"no picture")
    torn = [rows[0] | {"id": f"torn-{number}", "image": ["torn.jpg"]} for number in range(2)]
    options = argparse.Namespace(
        answers="", hf=str(hf), ckpt="", max_new_tokens=1, temperature=0.0, top_p=1.0, top_k=0, sampling_seed=0
    )
    with pytest.raises(ValueError, match="not one of the 2 questions could be asked.*a.ledger.jsonl says of each why"):
        answers_of(options, Questions(torn, tmp_path, tmp_path / "a.jsonl"), lambda *_: 0)
    assert len((tmp_path / "a.ledger.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("source", ["hf", "ckpt"])
def test_pixels_of_what_the_model_is_shown_are_known_from_its_processor(made, tmp_path, source):
    _, hf, _ = made
    options = argparse.Namespace(**{"answers": "", "hf": "", "ckpt": "", "tokenizer": "", source: str(hf)})
    shown = shown_size(options)
    assert shown is not None and shown(100, 61) == (96, 64)  # multiples of patch 16 x merge 2
    assert shown_size(argparse.Namespace(answers="said.json")) is None
    Image.new("RGB", (100, 61)).save(tmp_path / "picture.png")
    Image.new("L", (100, 61), 0).save(tmp_path / "mask.png")
    with Image.open(tmp_path / "mask.png") as mask:
        mask.paste(255, (50, 0, 100, 61))
        mask.save(tmp_path / "mask.png")
    question = {
        "question_id": "p",
        "question": "?",
        "question_type": "point",
        "img_path": "picture.png",
        "mask_path": "mask.png",
    }
    (tmp_path / "data.json").write_text(json.dumps([question]))
    benchmark = load_benchmark(tmp_path, tmp_path / "out", "shown-pixels", shown)
    # 49 of 96 is 51 of 100 pixels and on the mask; 49 of 100 is not
    assert score(benchmark.questions[0], "(49, 63)", benchmark.root).score == 1.0
    plain = load_benchmark(tmp_path, tmp_path / "out", "pixels").questions[0]
    assert score(plain, "(49, 60)", benchmark.root).score == 0.0
    with pytest.raises(ValueError, match="shown-pixels needs the model's processor"):
        load_benchmark(tmp_path, tmp_path / "out", "shown-pixels")


def test_a_question_that_no_tokenizer_takes_leaves_the_others(made, tmp_path):
    data, hf, rows = made
    out, calls = tmp_path / "a.jsonl", []
    broken = rows[0] | {"conversations": [{"from": "human", "value": "<image>half an emoji \ud83d"}]}
    answers = answer_all(Questions([broken, rows[1]], data, out), str(hf), counting(calls), DataConfig())
    assert answers.keys() == {rows[1]["id"]}
    (refused,) = map(json.loads, (tmp_path / "a.ledger.jsonl").read_text().splitlines())
    assert (refused["line"], refused["problem"]) == (1, "half a character")


def test_questions_nested_beyond_reading_are_no_json(tmp_path):
    (tmp_path / "data.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="data.json is not JSON"):
        read_questions(tmp_path)
