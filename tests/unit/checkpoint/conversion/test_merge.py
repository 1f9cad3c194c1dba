"""Adapters of a checkpoint as a folder of peft, and merged into their base, against peft itself."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from megatron_rb.checkpoint.hf.adapters import WEIGHTS
from megatron_rb.checkpoint.hf.names import canonical_name
from megatron_rb.checkpoint.hf.oracle import load_transformers
from megatron_rb.checkpoint.manager import CheckpointManager
from megatron_rb.checkpoint.sharded import TrainingState
from megatron_rb.cli import main as rb
from megatron_rb.config.schema import AdapterConfig, Config
from megatron_rb.parallel.session import Session
from megatron_rb.platform import get_platform
from megatron_rb.shapes.balance import default_layout
from megatron_rb.shapes.foreign import ADAPTER_CONFIG
from megatron_rb.shapes.shape import load_shape, model_fingerprint
from megatron_rb.train.build import build_trainable
from tests.parity.peft_models import load_adapted, write_adapter
from tests.parity.tiny_models import write_model

SETTINGS = {
    "lora": {"r": 3, "lora_alpha": 4, "target_modules": "all-linear"},
    "more": {"r": 2, "lora_alpha": 5, "use_rslora": True, "target_modules": ["q_proj", "qkv"]},
}


@pytest.fixture(scope="module", params=["qwen3_vl", "qwen2_5_vl"])
def run(request, lone_mesh, tmp_path_factory):
    """A checkpoint of two adapters that peft has made, and its folders: `hf`, `peft`, `checkpoint`."""
    root = tmp_path_factory.mktemp(request.param)
    hf = write_model(root / "hf", request.param, seed=0)
    peft = {name: write_adapter(hf, root / name, 0, **each) for name, each in SETTINGS.items()}
    shape = load_shape(hf)
    session = Session(get_platform("cpu"), lone_mesh, shape, default_layout(shape, 1), torch.device("cpu"))
    config = Config()
    config.model.dtype = "fp32"
    config.model.adapters = {name: AdapterConfig(init=str(folder)) for name, folder in peft.items()}
    trainable = build_trainable(session, config, str(hf))
    state = TrainingState(
        trainable.chunks,
        trainable.optimizer,
        {},
        model_fingerprint(shape) | trainable.identity,
        {},
        session.platform,
        lambda step: None,
        trainable.notes,
    )
    CheckpointManager(root / "run/checkpoints", asynchronous=False).save(1, state)
    (root / "run/checkpoints/hf").mkdir()
    (root / "run/checkpoints/hf/config.json").write_text((hf / "config.json").read_text())
    return SimpleNamespace(hf=hf, peft=peft, folder=root / "run")


def convert(*words) -> int:
    return rb(["convert", *map(str, words)])


def merged_by_peft(run, *names: str) -> dict[str, torch.Tensor]:
    """Weights by transformers' names, with the adapters merged one after the other."""
    weights = {name: each.clone() for name, each in load_transformers(run.hf).state_dict().items()}
    base = {name: each.clone() for name, each in weights.items()}
    for name in names:
        one = load_adapted(run.hf, run.peft[name]).merge_and_unload().state_dict()
        for key in weights:
            weights[key] += one[key] - base[key]
    return weights


def assert_close(folder, expected, **tolerance) -> None:
    found = {canonical_name(name): each for name, each in load_file(folder / "model.safetensors").items()}
    missing = expected.keys() - found.keys()
    assert missing <= {"lm_head.weight"}
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], **tolerance, msg=name)


@pytest.mark.parametrize("name", SETTINGS)
def test_an_exported_adapter_is_the_one_that_peft_saved(run, name, tmp_path):
    assert convert("export", "--adapters", "--adapter", name, "--ckpt", run.folder, "--out", tmp_path / "out") == 0
    ours, theirs = (load_file(folder / WEIGHTS) for folder in (tmp_path / "out", run.peft[name]))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    settings = json.loads((tmp_path / "out" / ADAPTER_CONFIG).read_text())
    assert (settings["r"], settings["lora_alpha"]) == (SETTINGS[name]["r"], SETTINGS[name]["lora_alpha"])
    assert settings["base_model_name_or_path"] == str(run.hf)


@pytest.mark.parametrize("name", SETTINGS)
def test_peft_loads_what_is_exported(run, name, tmp_path):
    convert("export", "--adapters", "--adapter", name, "--ckpt", run.folder, "--out", tmp_path / "out")
    ours, theirs = (load_adapted(run.hf, folder).state_dict() for folder in (tmp_path / "out", run.peft[name]))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_merged_adapter_is_what_peft_merges(run, tmp_path):
    words = ("--base", run.hf, "--adapter", run.peft["lora"], "--out", tmp_path / "out")
    assert convert("merge", *words) == 0
    assert_close(tmp_path / "out", merged_by_peft(run, "lora"), rtol=0, atol=1e-7)


def test_a_checkpoint_is_exported_with_all_its_adapters_merged(run, tmp_path):
    assert convert("export", "--ckpt", run.folder, "--out", tmp_path / "out") == 0
    assert_close(tmp_path / "out", merged_by_peft(run, *SETTINGS), rtol=0, atol=1e-6)


def test_what_rounding_takes_is_told_for_every_tensor(run, tmp_path, capsys):
    words = ("--base", run.hf, "--adapter", run.peft["lora"], "--dtype", "bf16", "--out", tmp_path / "out")
    assert convert("merge", *words) == 0
    told = json.loads((tmp_path / "out/manifest.json").read_text())["rounding"]
    base, exact = load_transformers(run.hf).state_dict(), merged_by_peft(run, "lora")
    written = load_file(tmp_path / "out/model.safetensors")
    assert {canonical_name(name) for name in told} == {name for name in base if (exact[name] != base[name]).any()}
    for name, rounding in told.items():
        key = canonical_name(name)
        lost = (written[name].float() - exact[key]).norm() / (exact[key] - base[key]).norm()
        assert rounding["lost"] == pytest.approx(float(lost), rel=1e-3)
    assert "of the updates" in " ".join(capsys.readouterr().out.split())


def test_an_adapter_of_another_base_is_refused(run, tmp_path):
    convert("export", "--adapters", "--adapter", "lora", "--ckpt", run.folder, "--out", tmp_path / "adapter")
    other = write_model(tmp_path / "other", json.loads((run.hf / "config.json").read_text())["model_type"], seed=0)
    weights = other / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    words = ("--base", other, "--adapter", tmp_path / "adapter", "--out", tmp_path / "out")
    with pytest.raises(ValueError, match="belongs to other base weights"):
        _main_of_convert("merge", *words)
    assert not (tmp_path / "out").exists()


def _main_of_convert(*words):
    """Without the net of the command line, which turns errors into sentences."""
    from megatron_rb.tools.convert import main

    return main([str(word) for word in words])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--adapters",), "holds the adapters lora, more; name one with --adapter"),
        (("--adapters", "--adapter", "loar"), "holds no adapter loar; it holds lora, more"),
        (("--base", "/nowhere"), "were /nowhere, which is not there; name them with --base"),
    ],
)
def test_what_cannot_be_exported_is_told(run, words, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        _main_of_convert("export", "--ckpt", run.folder, "--out", tmp_path / "out", *words)


def test_whole_weights_have_no_adapters(run, tmp_path):
    assert convert("import", "--hf", run.hf, "--out", tmp_path / "whole") == 0
    with pytest.raises(ValueError, match="holds whole weights and no adapters"):
        _main_of_convert("export", "--adapters", "--ckpt", tmp_path / "whole", "--out", tmp_path / "out")
