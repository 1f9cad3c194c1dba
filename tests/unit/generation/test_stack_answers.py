import json
import shutil

import pytest

from megatron_rb.config.compose import load_config, save_config
from megatron_rb.generation.spec import GenerationSpec, Sampling, part_file
from megatron_rb.generation.stack_answers import StackRequest, answer_with_stack, find_weights
from megatron_rb.tools import demo_model


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    root = tmp_path_factory.mktemp("stack")
    turns = [{"from": "human", "value": "how far?"}, {"from": "gpt", "value": "12 cm"}]
    (root / "texts.jsonl").write_text(json.dumps({"conversations": turns}) + "\n")
    assert demo_model.main(["--texts", str(root / "texts.jsonl"), "--out", str(root / "hf")]) == 0
    return root / "hf"


QUESTIONS = [{"id": f"q{n}", "image": [], "conversations": [{"from": "human", "value": f"{n}?"}]} for n in range(6)]


def workers(calls, out, *, only=6, code=0):
    """Stands for the processes: two copies of the model, of which each writes its part."""

    def start(folder, processes):
        spec = GenerationSpec.read(folder)
        asked = [json.loads(line)["id"] for line in open(spec.questions)]
        calls.append((spec, processes, asked))
        for rank in (0, 1):
            lines = [json.dumps({"question_id": key, "answer": f"{key}!"}) + "\n" for key in asked[rank:only:2]]
            part_file(out, rank).write_text("".join(lines))
        return code

    return start


def test_parts_become_one_file_in_the_order_of_the_questions(hf, tmp_path):
    out, calls = tmp_path / "a.jsonl", []
    request = StackRequest(str(hf), tp_size=2, processes=4, sampling=Sampling(0.1, 0.9, 50, 3))
    answers = answer_with_stack(QUESTIONS, tmp_path, out, request, workers(calls, out))
    assert answers == {f"q{n}": f"q{n}!" for n in range(6)}
    assert [json.loads(line)["question_id"] for line in open(out)] == [f"q{n}" for n in range(6)]
    (spec, processes, _) = calls[0]
    assert processes == 4 and spec.parallel.dp_size == 2 and spec.sampling == request.sampling
    assert spec.data.media_root == str(tmp_path.absolute()) and spec.dtype == "fp32"
    assert answer_with_stack(QUESTIONS, tmp_path, out, request, workers(calls, out)) == answers and len(calls) == 1


def test_a_failed_run_keeps_its_answers_and_goes_on(hf, tmp_path):
    out, calls = tmp_path / "a.jsonl", []
    with pytest.raises(ValueError, match="exit code 9.*4 of 6 answers are kept"):
        answer_with_stack(QUESTIONS, tmp_path, out, StackRequest(str(hf)), workers(calls, out, only=4, code=9))
    answers = answer_with_stack(QUESTIONS, tmp_path, out, StackRequest(str(hf)), workers(calls, out))
    assert calls[1][2] == ["q4", "q5"] and len(answers) == 6


def test_answers_of_two_models_or_samplings_are_not_mixed(hf, tmp_path):
    out = tmp_path / "a.jsonl"
    answer_with_stack(QUESTIONS, tmp_path, out, StackRequest(str(hf)), workers([], out))
    with pytest.raises(ValueError, match="answers of another run .*sampling"):
        answer_with_stack(QUESTIONS, tmp_path, out, StackRequest(str(hf), sampling=Sampling(1.0)), workers([], out))


def test_a_run_folder_brings_its_prompt_form_and_type(hf, tmp_path):
    run = tmp_path / "run"
    checkpoint = run / "checkpoints" / "step_00000003"
    checkpoint.mkdir(parents=True)
    (checkpoint / "checkpoint.json").write_text("{}")
    shutil.copytree(hf, run / "checkpoints" / "hf")
    config = load_config(["experiment=demo", "data.system_prompt=Be brief.", "model.dtype=bf16"])
    save_config(config, run / "config.yaml")
    weights = find_weights(StackRequest(str(run)))
    assert (weights.folder, weights.hf) == (checkpoint, run / "checkpoints" / "hf")
    out, calls = tmp_path / "a.jsonl", []
    answer_with_stack(QUESTIONS, tmp_path, out, StackRequest(str(run)), workers(calls, out))
    assert (calls[0][0].data.system_prompt, calls[0][0].dtype) == ("Be brief.", "bf16")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tp_size": 3}, "tp_size 3 does not divide"),
        ({"tp_size": 2, "processes": 3}, "use a multiple of 2"),
        ({"layout": "P v | M E t L"}, "v"),
        ({"max_new_tokens": 0}, "at least 1"),
    ],
)
def test_requests_that_cannot_be_met_are_refused_before_anything_starts(hf, tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        request = StackRequest(str(hf), **wrong)
        answer_with_stack(QUESTIONS, tmp_path, tmp_path / "a.jsonl", request, workers([], tmp_path / "a.jsonl"))
    assert not (tmp_path / "a.jsonl").exists()


def test_no_checkpoint_is_said_so(tmp_path):
    with pytest.raises(ValueError, match="there is no checkpoint folder"):
        find_weights(StackRequest(str(tmp_path / "nothing")))
