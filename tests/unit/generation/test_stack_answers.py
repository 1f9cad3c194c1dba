import argparse
import json
import shutil

import pytest

from megatron_rb.config.compose import CONFIG_FILE, config_from_file, load_config, save_config
from megatron_rb.generation.answer_source import add_arguments, answers_of
from megatron_rb.generation.questions import Questions
from megatron_rb.generation.spec import GenerationSpec, Sampling, part_file
from megatron_rb.generation.stack_answers import StackRequest, answer_with_stack, find_weights
from megatron_rb.platform.cpu import CpuPlatform
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
        calls.append((spec, config_from_file(folder / CONFIG_FILE), processes, asked))
        for rank in (0, 1):
            lines = [json.dumps({"question_id": key, "answer": f"{key}!"}) + "\n" for key in asked[rank:only:2]]
            part_file(out, rank).write_text("".join(lines))
        return code

    return start


def ask(media_root, out, request, start):
    return answer_with_stack(Questions(QUESTIONS, media_root, out), request, start)


def test_parts_become_one_file_in_the_order_of_the_questions(hf, tmp_path):
    out, calls = tmp_path / "a.jsonl", []
    request = StackRequest(str(hf), tp_size=2, processes=4, sampling=Sampling(0.1, 0.9, 50, 3))
    answers = ask(tmp_path, out, request, workers(calls, out))
    assert answers == {f"q{n}": f"q{n}!" for n in range(6)}
    assert [json.loads(line)["question_id"] for line in open(out)] == [f"q{n}" for n in range(6)]
    (spec, config, processes, _) = calls[0]
    assert processes == config.world_size == 4 and config.parallel.tp_size == 2 and spec.sampling == request.sampling
    assert config.data.media_root == str(tmp_path.absolute()) and config.model.dtype == "fp32"
    assert ask(tmp_path, out, request, workers(calls, out)) == answers and len(calls) == 1


def test_a_failed_run_keeps_its_answers_and_goes_on(hf, tmp_path):
    out, calls = tmp_path / "a.jsonl", []
    with pytest.raises(ValueError, match="exit code 9.*4 of 6 answers are kept"):
        answer_with_stack(
            Questions(QUESTIONS, tmp_path, out), StackRequest(str(hf)), workers(calls, out, only=4, code=9)
        )
    answers = ask(tmp_path, out, StackRequest(str(hf)), workers(calls, out))
    assert calls[1][3] == ["q4", "q5"] and len(answers) == 6


def test_answers_of_two_models_or_samplings_are_not_mixed(hf, tmp_path):
    out = tmp_path / "a.jsonl"
    ask(tmp_path, out, StackRequest(str(hf)), workers([], out))
    with pytest.raises(ValueError, match="answers of another run .*sampling"):
        answer_with_stack(
            Questions(QUESTIONS, tmp_path, out), StackRequest(str(hf), sampling=Sampling(1.0)), workers([], out)
        )


def test_answers_of_two_types_are_not_mixed(hf, tmp_path):
    out, calls = tmp_path / "a.jsonl", []
    ask(tmp_path, out, StackRequest(str(hf), dtype="fp32"), workers(calls, out))
    with pytest.raises(ValueError, match="answers of another run .dtype was 'fp32', is 'bf16'.; choose another --out"):
        ask(tmp_path, out, StackRequest(str(hf), dtype="bf16"), workers(calls, out))
    ask(tmp_path, out, StackRequest(str(hf), tp_size=2, sequences=3), workers(calls, out))  # another layout may go on
    assert len(calls) == 1


def trained_run(folder, hf, *settings):
    """The folder of a run with these settings: its config and a checkpoint."""
    run = folder / "run"
    checkpoint = run / "checkpoints" / "step_00000003"
    checkpoint.mkdir(parents=True)
    (checkpoint / "checkpoint.json").write_text("{}")
    shutil.copytree(hf, run / "checkpoints" / "hf")
    save_config(load_config(["experiment=demo", *settings]), run / CONFIG_FILE)
    return run


def test_a_run_folder_brings_its_prompt_form_and_type(hf, tmp_path):
    run = trained_run(tmp_path, hf, "data.system_prompt=Be brief.", "model.dtype=bf16")
    checkpoint = run / "checkpoints" / "step_00000003"
    weights = find_weights(StackRequest(str(run)))
    assert (weights.folder, weights.hf) == (checkpoint, run / "checkpoints" / "hf")
    out, calls = tmp_path / "a.jsonl", []
    ask(tmp_path, out, StackRequest(str(run)), workers(calls, out))
    assert (calls[0][1].data.system_prompt, calls[0][1].model.dtype) == ("Be brief.", "bf16")


def test_answers_are_computed_by_the_kernels_and_layers_of_the_run(hf, tmp_path):
    run = trained_run(tmp_path, hf, "kernels.mrope=torch", "kernels.rms_norm=torch", "model.layers=local")
    out, calls = tmp_path / "a.jsonl", []
    ask(tmp_path, out, StackRequest(str(run)), workers(calls, out))
    config = calls[0][1]
    assert (config.kernels.mrope, config.kernels.rms_norm, config.kernels.swiglu) == ("torch", "torch", "auto")
    assert config.model.layers == "local"


@pytest.mark.parametrize(
    ("trained", "reason", "way_out"),
    [
        (
            ("kernels.varlen_attention=flash_attn_3",),
            "varlen_attention=flash_attn_3 was asked for, but it does not run on cpu",
            "add --set kernels.varlen_attention=auto",
        ),
        (
            ("model.layers=transformer_engine", "kernels.varlen_attention=flash_attn_3"),
            "Transformer Engine is not installed",
            "add --set model.layers=auto --set kernels.varlen_attention=auto",
        ),
    ],
)
def test_kernels_of_the_run_that_cannot_run_here_are_refused_with_the_way_out(
    hf, tmp_path, monkeypatch, trained, reason, way_out
):
    monkeypatch.setattr(CpuPlatform, "offers", lambda self, name: False)
    run = trained_run(tmp_path, hf, *trained)
    out, calls = tmp_path / "a.jsonl", []
    with pytest.raises(ValueError, match=f"run cannot be answered as it was trained.*{reason}.*; {way_out}$"):
        ask(tmp_path, out, StackRequest(str(run)), workers(calls, out))
    assert not calls and not out.exists()
    settings = tuple(word for word in way_out.split() if "=" in word)
    answer_with_stack(
        Questions(QUESTIONS, tmp_path, out), StackRequest(str(run), settings=settings), workers(calls, out)
    )
    assert (calls[0][1].model.layers, calls[0][1].kernels.varlen_attention) == ("auto", "auto")


def test_the_command_line_changes_what_the_run_says(hf, tmp_path):
    run = trained_run(tmp_path, hf, "kernels.mrope=triton", "kernels.rms_norm=torch")
    parser = argparse.ArgumentParser()
    add_arguments(parser, 8, "")
    options = parser.parse_args(["--ckpt", str(run), "--set", "kernels.mrope=torch", "--set", "model.layers=local"])
    out, calls, started = tmp_path / "a.jsonl", [], []

    def start(function, folder, processes):
        started.append(function)
        return workers(calls, out)(folder, processes)

    assert len(answers_of(options, Questions(QUESTIONS, tmp_path, out), start)) == len(QUESTIONS)
    config = calls[0][1]
    assert (config.kernels.mrope, config.kernels.rms_norm, config.model.layers) == ("torch", "torch", "local")
    assert started == ["megatron_rb.generation.run:answer"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("parallel.tp_size=2", "--set parallel.tp_size=2: only kernels., model.layers, .* may be set here"),
        ("kernels.mrope=fast", "kernels.mrope 'fast' is not known; use auto, triton or torch"),
        ("kernels.rope=auto", "there is no setting 'kernels.rope'; did you mean kernels.mrope"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(hf, tmp_path, setting, message):
    request = StackRequest(str(hf), settings=(setting,))
    with pytest.raises(ValueError, match=message):
        answer_with_stack(
            Questions(QUESTIONS, tmp_path, tmp_path / "a.jsonl"), request, workers([], tmp_path / "a.jsonl")
        )


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
        answer_with_stack(
            Questions(QUESTIONS, tmp_path, tmp_path / "a.jsonl"), request, workers([], tmp_path / "a.jsonl")
        )
    assert not (tmp_path / "a.jsonl").exists()


def test_no_checkpoint_is_said_so(tmp_path):
    with pytest.raises(ValueError, match="there is no checkpoint folder"):
        find_weights(StackRequest(str(tmp_path / "nothing")))
