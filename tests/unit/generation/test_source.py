"""Answers of two models, or of two ways to compute one, are never mixed in one file."""

import json
import os
import shutil
from pathlib import Path

import pytest

from megatron_rb.config.compose import with_settings
from megatron_rb.config.schema import Config, DataConfig
from megatron_rb.data.answer_file import check_same_source
from megatron_rb.generation.source import source_of_stack, source_of_transformers
from megatron_rb.generation.spec import Sampling
from tests.parity.tiny_models import write_model


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    folder = write_model(tmp_path / "hf", "qwen3_vl", seed=0)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def answered(
    out: Path, hf: Path, *settings: str, tokenizer: Path | None = None, checkpoint: Path | None = None
) -> None:
    """Answers of this model with these settings are about to be written into `out`, where there are some."""
    config = with_settings(Config(), settings)
    check_same_source(out, source_of_stack(checkpoint or hf, tokenizer or hf, config, Sampling(), 8))
    out.touch()


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("model.dtype=fp32", "dtype was 'bf16', is 'fp32'"),
        ("model.layers=local", "layers was 'auto', is 'local'"),
        ("kernels.mrope=torch", "kernels.mrope was 'auto', is 'torch'"),
        ("platform.tf32=true", "tf32 was False, is True"),
        ("data.system_prompt=Be brief.", "prompt.system_prompt was 'You are a helpful assistant.', is 'Be brief.'"),
        ("data.max_pixels=50176", "prompt.max_pixels was 0, is 50176"),
    ],
)
def test_another_way_to_compute_is_refused(hf, tmp_path, setting: str, said: str):
    answered(tmp_path / "a.jsonl", hf)
    with pytest.raises(ValueError, match=rf"holds answers of another run \({said}\); choose another --out"):
        answered(tmp_path / "a.jsonl", hf, setting)


def test_another_tokenizer_is_refused(hf, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(hf, other)
    (other / "tokenizer.json").write_text('{"model": 1}')
    answered(tmp_path / "a.jsonl", hf)
    with pytest.raises(ValueError, match="tokenizer was .*/hf', is .*/other'; tokenizer_digest was"):
        answered(tmp_path / "a.jsonl", hf, tokenizer=other)


@pytest.mark.parametrize("program", ["stack", "transformers"])
@pytest.mark.parametrize(
    ("file", "said"), [("model.safetensors", "weights_digest"), ("config.json", "tokenizer_digest")]
)
def test_another_model_under_the_same_path_is_refused(hf, tmp_path, program: str, file: str, said: str):
    def answer() -> None:
        if program == "stack":
            answered(tmp_path / "a.jsonl", hf)
        else:
            check_same_source(tmp_path / "a.jsonl", source_of_transformers(hf, DataConfig(), 8))

    answer()
    (tmp_path / "a.jsonl").touch()
    answer()  # nothing has changed yet
    content = (hf / file).read_bytes()
    (hf / file).write_bytes(content + b" ")
    with pytest.raises(ValueError, match=rf"holds answers of another run \({said} was "):
        answer()


def test_weights_of_another_time_are_refused(hf, tmp_path):
    checkpoint = tmp_path / "step_00000004"
    checkpoint.mkdir()
    (checkpoint / "__0_0.distcp").write_text("weights")
    answered(tmp_path / "a.jsonl", hf, checkpoint=checkpoint)
    os.utime(checkpoint / "__0_0.distcp", (1, 1))
    with pytest.raises(ValueError, match="weights_digest was"):
        answered(tmp_path / "a.jsonl", hf, checkpoint=checkpoint)


def test_one_folder_written_relative_and_absolute_is_one_model(hf, tmp_path, monkeypatch):
    answered(tmp_path / "a.jsonl", hf)
    monkeypatch.chdir(tmp_path)
    answered(tmp_path / "a.jsonl", Path("hf"))
    assert json.loads((tmp_path / "a.source.json").read_text())["weights"] == str(hf.resolve())
