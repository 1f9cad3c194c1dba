"""Answers equal transformers' `generate`, whatever the layout and the batch."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from megatron_rb.builders.build import SampleMix, build_rows
from megatron_rb.builders.episodes import read_episodes
from megatron_rb.checkpoint.hf.oracle import load_transformers, model_inputs
from megatron_rb.generation.answering import answer_with_transformers
from megatron_rb.generation.questions import Questions
from megatron_rb.shapes.shape import load_shape
from megatron_rb.tools import demo_model
from tests.distributed.cases_generation import prompts_of
from tests.distributed.forked import REPOSITORY, run_forked
from tests.distributed.launched import LAUNCHED
from tests.distributed.world import run_world
from tests.parity.tiny_models import write_model

HELDOUT = REPOSITORY / "examples" / "robosim" / "heldout"
SEED, TOKENS = 7, 14


def transformers_answers(folder, shape, eos: list[int]) -> dict[str, list[int]]:
    """Token by token, prompt by prompt, greedy."""
    torch.set_num_threads(1)
    model = load_transformers(folder).eval()
    answers = {}
    for prompt in prompts_of(shape, SEED):
        inputs = model_inputs(prompt, shape)
        with torch.no_grad():
            ids = model.generate(
                **inputs, do_sample=False, max_new_tokens=TOKENS, eos_token_id=eos, pad_token_id=eos[0]
            )
        answers[prompt.sample_id] = [t for t in ids[0, inputs["input_ids"].shape[1] :].tolist() if t not in eos]
    return answers


def end_token(answers: dict[str, list[int]]) -> int:
    """A token at which some answers would end early and others not."""
    for token in range(128):
        ended = sum(token in answer[2:] for answer in answers.values())
        if 0 < ended < len(answers):
            return token
    raise AssertionError("no token tells the answers apart; use another seed")


def cuts(vision: int, decoder: int) -> list[dict]:
    whole = f"P v*{vision} M E t*{decoder} L"
    in_vision = f"P v*2 | v*{vision - 2} M E t*{decoder} L"
    four = f"P v*2 | v*{vision - 2} M | E t*1 | t*{decoder - 1} L"
    virtual = f"P v*1 | v*{vision - 1} M | E t*2 | t*{decoder - 2} L"
    return [
        {"tp": 1, "pp": 1, "layout": whole, "batch": 1, "compare_uncached": True},
        {"tp": 1, "pp": 1, "layout": whole, "batch": 3},
        {"tp": 2, "pp": 1, "layout": whole, "batch": 8},
        {"tp": 2, "pp": 1, "layout": whole, "batch": 2, "sp": True},
        {"tp": 1, "pp": 2, "layout": in_vision, "batch": 2},
        {"tp": 2, "pp": 2, "layout": in_vision, "batch": 3, "sp": True},
        {"tp": 1, "pp": 4, "layout": four, "batch": 1},
        {"tp": 1, "pp": 2, "layout": virtual, "batch": 2},
    ]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_every_layout_answers_as_transformers_generates(family, tmp_path):
    folder = write_model(tmp_path / family, family, seed=1)
    shape = load_shape(folder)
    unended = transformers_answers(folder, shape, [127])
    eos = [end_token(unended), 127]
    wanted = transformers_answers(folder, shape, eos)
    assert len({tuple(answer) for answer in wanted.values()}) > 2
    assert any(len(answer) == TOKENS for answer in wanted.values())
    same = {"hf": str(folder), "sample_seed": SEED, "eos": eos, "tokens": TOKENS}
    greedy = [case | same for case in cuts(shape.vision.num_layers, shape.text.num_layers)]
    drawn = [case | same | {"sampling": {"temperature": 1.5, "top_p": 0.9, "top_k": 20, "seed": 3}} for case in greedy]
    other = drawn[1] | {"sampling": drawn[1]["sampling"] | {"seed": 4}}
    for case in drawn:
        case.pop("compare_uncached", None)
    cases = [*greedy, *drawn[:2], drawn[5], other]
    results = run_world("tests.distributed.cases_generation:generation", 4, timeout=280, cases=cases)[0]
    for case, result in zip(greedy, results, strict=False):
        assert result["ranks_agree"], case
        assert result["answers"] == wanted, case
    assert results[0]["uncached"] < 1e-4
    first, second, third, other_seed = results[len(greedy) :]
    assert first["answers"] == second["answers"] == third["answers"], "draws depend on the layout"
    assert other_seed["answers"] != first["answers"] != wanted


def command(*words: object, folder: Path) -> subprocess.CompletedProcess:
    return run_forked(LAUNCHED, *words, folder=folder, timeout=120)


@pytest.mark.timeout(200)
def test_the_command_answers_in_two_copies_and_continues_a_stopped_run(tmp_path):
    rows = build_rows(read_episodes(HELDOUT)[:1], HELDOUT, SampleMix(tasks=("uvd", "hop")), seed=0)[0][:14]
    for row in rows:
        row["image"] = [str(HELDOUT / path) for path in row["image"]]
        row |= {"mask": str(HELDOUT / row["mask"])} if "mask" in row else {}
    whole = Path(rows[0]["image"][0]).read_bytes()
    (tmp_path / "torn.jpg").write_bytes(whole[: len(whole) // 2])  # the header is right, the pixels end early
    torn = rows[0] | {"id": "torn", "image": [str(tmp_path / "torn.jpg")]}
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in [*rows, torn]))
    assert demo_model.main(["--texts", str(data), "--out", str(tmp_path / "hf")]) == 0
    wanted = answer_with_transformers(Questions(rows, tmp_path, tmp_path / "wanted.jsonl"), str(tmp_path / "hf"), 12)
    assert len(set(wanted.values())) > 2
    # what a run that was killed has left: answers of one copy, the last line half written
    out = tmp_path / "out"
    out.mkdir()
    left = json.dumps({"question_id": rows[1]["id"], "answer": "kept"}) + '\n{"question_id": "ha'
    (out / "answers.part1.jsonl").write_text(left)
    words = ["eval", "--ckpt", tmp_path / "hf", "--data", data, "--out", out, "--max-new-tokens", 12, "--batch", 3]
    done = command(*words, "--processes", 2, folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    answers = {row["question_id"]: row["answer"] for row in map(json.loads, open(out / "answers.jsonl"))}
    assert list(answers) == [row["id"] for row in rows]
    assert answers == wanted | {rows[1]["id"]: "kept"}
    assert "torn" in (out / "answers.ledger.jsonl").read_text() and not list(out.glob("*part*"))
    assert "failed" in done.stdout and (out / "report.html").is_file()
    other = command(*words, "--temperature", 1, folder=tmp_path)
    assert other.returncode == 2 and "answers of another run" in other.stderr
    # the same for value: pairs of one short episode, two tensor-parallel ranks, drawn answers
    episode = [line for line in open(HELDOUT / "lift.jsonl") if '"lift_003/' in line]
    frames = tmp_path / "frames.jsonl"
    frames.write_text("".join(line.replace('"lift_003/', f'"{HELDOUT}/lift_003/') for line in episode))
    score = [
        "value",
        "score",
        "--ckpt",
        tmp_path / "hf",
        "--data",
        frames,
        "--out",
        tmp_path / "curves.jsonl",
        "--tp",
        2,
    ]
    done = command(*score, "--max-new-tokens", 3, "--temperature", 0.1, "--top-k", 50, "--interval", 4, folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    curves = json.loads((tmp_path / "curves.jsonl").read_text())
    assert curves["answers"] == 4 * (len(curves["frames"]) - 1) > 0
