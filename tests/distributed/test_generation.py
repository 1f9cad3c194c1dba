"""Answers equal transformers' `generate`, whatever the layout and the batch."""

import pytest
import torch

from megatron_rb.checkpoint.hf.oracle import load_transformers, model_inputs
from megatron_rb.models.robobrain.config import load_shape
from tests.distributed.cases_generation import prompts_of
from tests.distributed.world import run_world
from tests.parity.tiny_models import write_model

SEED, TOKENS = 7, 14


def transformers_answers(folder, shape, eos: list[int]) -> dict[str, list[int]]:
    """Token by token, prompt by prompt, greedy."""
    torch.set_num_threads(1)
    model = load_transformers(folder).eval()
    answers = {}
    for prompt in prompts_of(shape, SEED):
        inputs = model_inputs(prompt, shape)
        with torch.no_grad():
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=TOKENS, eos_token_id=eos, pad_token_id=eos[0])
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
