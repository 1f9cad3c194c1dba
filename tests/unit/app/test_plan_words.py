"""The words of `rb plan`: what they reach, and which are refused."""

import re
from pathlib import Path

import pytest

from megatron_rb.app.plan_words import read_bytes, read_request
from tests.unit.app.test_planning import model_folder
from tests.unit.planner.cases import mixed_histogram


@pytest.fixture
def stats(tmp_path: Path) -> str:
    mixed_histogram().save(tmp_path / "stats.json")
    return f"data={tmp_path / 'stats.json'}"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model=robobrain20_7b", "gpus=8", "data=x"], "rb plan needs cluster"),
        (["cluster=h200", "gpus=8", "data=x"], "rb plan needs a model"),
        (["model=robobrain20_7b", "cluster=h200", "gpus=8", "dat=x"], "rb plan knows no 'dat'; did you mean data"),
        (["model=robobrain20_7b", "cluster=h200", "gpus=eight", "data=x"], "there is no histogram x|whole number"),
        (["model=robobrain99", "cluster=h200", "gpus=8", "data=x"], "model 'robobrain99' is neither"),
        (["model=robobrain20_7b", "cluster=h200", "gpus=8", "data=nothing.json"], "there is no histogram nothing.json"),
        (["model=robobrain20_7b", "cluster=h200", "gpus=8", "max_gpu_memory=80XB", "data=x"], "is no size"),
    ],
)
def test_words_that_cannot_be_meant(words: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        read_request(words)


def test_words_reach_the_task(stats: str):
    words = ["experiment=robobrain20_32b_cot", "model=robobrain20_32b", "tp=8", "cluster=a800", "gpus=64", stats]
    words += ["cp=2", "max_gpu_memory=70GiB"]
    words += ["global_batch_size=128", "model.freeze.vision=true", "sequence_parallel=true"]
    request = read_request(words)
    assert request.shape.text.num_layers == 64
    assert request.config.data.seq_length == 32768 and request.config.data.global_batch_size == 128
    assert request.config.model.freeze.vision
    assert request.device.memory == 70 * 2**30
    assert request.asked == {"tp": 8, "cp": 2, "sequence_parallel": 1}


def test_sizes_in_words():
    assert [read_bytes(text) for text in ("80e9", "80GB", "1.5GiB")] == [80e9, 80e9, 1.5 * 2**30]


WORDS = ["model=robobrain20_7b", "cluster=h200", "gpus=8"]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("planner.max_memory=1e9", "rb plan does not read planner.max_memory; max_gpu_memory= says it here"),
        ("planner.device=h100", "rb plan does not read planner.device; cluster= says it here already"),
        ("planner.histogram=x.json", "does not read planner.histogram; data= says it here"),
        ("planner.calibration=x.json", "does not read planner.calibration; calibration= says it here"),
        ("data.train=[a.jsonl]", "does not read data.train; data= says it here"),
        ("model.hf_path=x", "does not read model.hf_path; model= says it here already"),
        ("parallel.tp_size=2", "does not read parallel.tp_size; tp= says it here"),
        ("parallel.pp_size=2", "does not read parallel.pp_size; pp= says it here"),
        ("+parallel.cp_size=2", "does not read parallel.cp_size; cp= says it here"),
        ("parallel.layout=P v | t", "does not read parallel.layout: it is what the plan finds out"),
        ("model.recompute.language=1", "does not read model.recompute.language: it is what the plan finds out"),
        ("cluster.nodes=2", "does not read cluster.nodes; gpus= says it here already"),
    ],
)
def test_a_setting_that_would_change_nothing_is_refused_with_the_word_that_does(word: str, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_request([*WORDS, word])


def test_a_file_of_settings_that_would_change_nothing_is_refused(tmp_path: Path):
    (tmp_path / "plan.yaml").write_text("world_size: 16\n")
    with pytest.raises(ValueError, match="does not read world_size; gpus= says it here already"):
        read_request([*WORDS, f"settings={tmp_path / 'plan.yaml'}"])


def test_the_folder_of_a_recipe_may_be_another_where_no_model_is_named(stats: str, tmp_path: Path):
    hf = model_folder(tmp_path / "hf")
    words = ["experiment=robobrain20_3b_stage1", f"model.hf_path={hf}", "cluster=h200", "gpus=8", stats]
    assert read_request(words).shape.text.num_layers == 28


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gpus=16"], "gpus is given twice, as 8 and as 16; leave one of them out"),
        (["optimizer.lr=1e-3", "optimizer.lr=1e-4"], "optimizer.lr is given twice"),
        (
            ["seq_length=4096", "data.seq_length=8192"],
            "does not read data.seq_length; seq_length= says it here already",
        ),
        (["data="], "data= has no value; give one, or leave the word out"),
        (["model="], "model is given twice"),
        (["tp="], "tp= has no value"),
        (["max_gpu_memory=0"], "max_gpu_memory is 0; it must be above 0"),
        (["max_gpu_memory=-1GB"], "max_gpu_memory '-1GB' is no size"),
        (["max_gpu_memory=1e999"], "max_gpu_memory is 1e999; it must be above 0"),
        (["sequence_parallel=maybe"], "sequence_parallel must be true or false, got 'maybe'"),
        (["sequence_parallel=2"], "sequence_parallel must be true or false, got '2'"),
        (["tp=0"], "tp is 0; it must be at least 1"),
    ],
)
def test_a_word_that_cannot_be_meant_is_refused(words: list[str], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_request([*WORDS, *words])


@pytest.mark.parametrize(
    ("text", "size"), [("80gb", 80e9), ("80 GB", 80e9), ("74.5gib", 74.5 * 2**30), ("500MB", 5e8), ("8E9", 8e9)]
)
def test_units_may_be_small_letters(text: str, size: float):
    assert read_bytes(text) == size
