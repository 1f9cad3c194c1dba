"""Every kind of difference is found, named, and ends in exit code 1."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_rb.checkpoint.conversion.export_hf import export_checkpoint
from megatron_rb.checkpoint.conversion.import_hf import import_folder
from megatron_rb.checkpoint.conversion.verify import verify
from megatron_rb.cli import main as rb
from tests.parity.tiny_models import write_model

NAME = "model.language_model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    root = tmp_path_factory.mktemp("original")
    write_model(root / "hf", "qwen3_vl", 0)
    import_folder(root / "hf", root / "ckpt")
    return root


CHANGES = {
    "missing in B": lambda tensors: tensors.pop(NAME),
    "missing in A": lambda tensors: tensors.update({"model.extra": torch.zeros(2)}),
    "dtype": lambda tensors: tensors.update({NAME: tensors[NAME].half()}),
    "shape": lambda tensors: tensors.update({NAME: tensors[NAME].T.contiguous()}),
    "bytes": lambda tensors: tensors[NAME].view(torch.int32)[0, :1].add_(1),
}


@pytest.mark.parametrize("what", CHANGES)
def test_difference_is_named(original, tmp_path, capsys, what):
    changed = shutil.copytree(original / "hf", tmp_path / "hf")
    tensors = load_file(changed / "model.safetensors")
    CHANGES[what](tensors)
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    for source in (original / "hf", original / "ckpt"):
        found = verify(source, changed).differences
        assert [(d.what, d.name) for d in found] == [(what, "model.language_model.extra" if "A" in what else NAME)]
        assert rb(["convert", "verify", str(source), str(changed), "--json"]) == 1
        printed = capsys.readouterr().out
        assert json.loads(printed[printed.index("{\n") :])["equal"] is False


def test_equal_folders(original, tmp_path):
    export_checkpoint(original / "ckpt", tmp_path / "out", max_shard_size="300KB")
    for one, other in ((original / "hf", tmp_path / "out"), (original / "ckpt", tmp_path / "out")):
        comparison = verify(one, other)
        assert comparison.equal and comparison.compared > 100 and comparison.num_bytes > 1e6
        assert rb(["convert", "verify", str(one), str(other)]) == 0


def test_scalars_of_checkpoints_are_compared(original, tmp_path):
    other = shutil.copytree(original / "ckpt", tmp_path / "other")
    torch.save({"parts": {"schedule": {"finished_steps": 4}}}, other / "common.pt")
    found = verify(original / "ckpt", other).differences
    assert [(d.name, d.what, d.a, d.b) for d in found] == [("parts.schedule.finished_steps", "scalars", "None", "4")]


def test_no_folder(original, tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        verify(original / "hf", tmp_path / "nothing")
