"""What a benchmark is given before anything starts, and the sentences for what does not fit."""

import json

import pytest
import torch

from megatron_rb.bench.train.prepare import BenchRequest, prepared
from megatron_rb.bench.train.spec import read_spec
from megatron_rb.checkpoint.hf.oracle import load_transformers
from megatron_rb.checkpoint.hf.training import padded_batches, write_random_weights
from megatron_rb.config.compose import config_from_file
from megatron_rb.parity.samples import draw_samples
from megatron_rb.shapes.published import published_shape
from tests.parity.tiny_models import write_model

PLAIN = BenchRequest(("platform=cpu",), "RoboBrain2.0-3B", "tiny", steps=5, warmup=1, baseline=False, peak_tflops=0.0)


def request(*settings: str, **changes) -> BenchRequest:
    return BenchRequest(**{**vars(PLAIN), "settings": ("platform=cpu", *settings), **changes})


def test_a_published_model_needs_no_folder(tmp_path):
    with prepared(request("parallel.pp_size=2", "world_size=4"), tmp_path / "out") as ready:
        config, spec = config_from_file(tmp_path / "out/config.yaml"), read_spec(tmp_path / "out")
        assert json.loads((tmp_path / "out/model/config.json").read_text())["hidden_size"] == 2048
    assert ready.processes == 4
    assert (config.checkpoint.init, config.model.dtype) == ("random", "fp32")
    assert (spec.model, spec.mix.name) == ("RoboBrain2.0-3B", "tiny")
    assert config.data.global_micro_batches == 2 * spec.mix.micro_batches  # two copies of the model
    assert (config.data.seq_length, config.data.max_patches) == (spec.mix.seq_length, spec.mix.max_patches)
    assert not (tmp_path / "out/model").exists()


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (request("data.seq_length=64"), r"data.seq_length=64 belongs to the mix 'tiny'.*--mix"),
        (request(mix="tinny"), "there is no mix 'tinny'; did you mean tiny"),
        (request("data.train=[a.jsonl]"), "--mix tiny and data.train are both given"),
        (request("parallel.pp_size=2", baseline=True), "in one process, the settings ask for 2"),
        (request(model="nowhere"), "no config.json in nowhere; give a Hugging Face folder with --model"),
        (request(steps=0), "steps is 0; it must be at least 1"),
        (request("parallel.tp_size=4"), "tp_size 4 does not divide"),
    ],
    ids=["seq_length", "mix", "data and mix", "baseline", "model", "steps", "tp"],
)
def test_what_does_not_fit_is_said_and_leaves_nothing(question, message, tmp_path):
    with pytest.raises(ValueError, match=message), prepared(question, tmp_path / "out"):
        raise AssertionError("prepared what cannot run")
    assert not (tmp_path / "out").exists()


def test_a_folder_with_results_is_never_written_over(tmp_path):
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(ValueError, match="is not empty; name a new folder"), prepared(PLAIN, tmp_path):
        pass
    assert (tmp_path / "result.json").read_text() == "{}"


def test_random_weights_complete_a_folder_with_a_config_alone(tmp_path):
    full = write_model(tmp_path / "full", "qwen3_vl", seed=0)
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "config.json").write_text((full / "config.json").read_text())
    write_random_weights(alone, torch.float32)
    names = [name for name, _ in load_transformers(alone).named_parameters()]
    assert names == [name for name, _ in load_transformers(full).named_parameters()]


def test_padded_batches_hold_every_sample_and_keep_the_budget():
    samples = draw_samples(published_shape("RoboBrain2.5-8B"), seed=1)
    longest = max(len(sample.input_ids) for sample in samples)
    for budget in (1, longest, 3 * longest, 10**6):
        batches = padded_batches(samples, budget)
        assert sorted(s.sample_id for batch in batches for s in batch) == sorted(s.sample_id for s in samples)
        sizes = [len(batch) * max(len(sample.input_ids) for sample in batch) for batch in batches]
        assert all(size <= budget or len(batch) == 1 for size, batch in zip(sizes, batches, strict=True))
    assert len(padded_batches(samples, 10**6)) == 1
