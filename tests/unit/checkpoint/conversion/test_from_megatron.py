"""Legacy Megatron trees end as checkpoints that hold the Hugging Face folder they were cut from, bit for bit."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_rb.checkpoint.conversion.describe import describe
from megatron_rb.checkpoint.conversion.export_hf import export_checkpoint
from megatron_rb.checkpoint.conversion.from_megatron import convert_legacy
from megatron_rb.checkpoint.conversion.import_hf import import_folder
from megatron_rb.checkpoint.conversion.verify import verify
from megatron_rb.checkpoint.hf.table import stored_rules
from megatron_rb.checkpoint.storage.restricted import read_torch_file
from megatron_rb.checkpoint.storage.tensors import open_files
from megatron_rb.checkpoint.storage.torch_dist import read_dist_folder
from megatron_rb.shapes.shape import load_shape
from tests.unit.checkpoint.legacy import trees
from tests.unit.checkpoint.legacy.test_optimizer import written
from tests.unit.checkpoint.legacy.trees import UNEVEN, VIRTUAL, Tree

TAGS = (b"musa", b"cuda", b"transformer_engine", b"megatron.core")


@pytest.mark.parametrize("tag", ["musa:0", "cuda:3"])
def test_tree_of_a_device_is_converted_without_its_vendor(tag, tmp_path):
    tree = Tree(tp=2, pp=2, chunk_layers=((1,), (3,)), args={"decoder_first_pipeline_num_layers": 1}, device_tag=tag)
    root, hf, _ = written(tmp_path, tree)
    file = next(root.rglob("model_optim_rng.pt"))
    with pytest.raises((RuntimeError, AssertionError, TypeError), match=tag.partition(":")[0]):
        torch.load(file, weights_only=False)
    command = ["convert", "from-megatron", "--ckpt", root, "--hf", hf, "--out", tmp_path / "out"]
    subprocess.run([sys.executable, "-m", "megatron_rb.cli", *map(str, command)], check=True, timeout=120)
    assert verify(tmp_path / "out", hf).equal
    for path in (tmp_path / "out").iterdir():
        if path.name in (".metadata", "common.pt", "metadata.json", "checkpoint.json"):
            assert not [word for word in TAGS if word in path.read_bytes()], path
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert tag in manifest["source"]["device_tags"]
    assert manifest["source"]["layout"] == {"tp": 2, "pp": 2, "virtual_chunks": 1}
    assert manifest["main_weights"]["differing"] == []


@pytest.mark.parametrize("tree", [UNEVEN, VIRTUAL], ids=["uneven", "virtual"])
def test_optimizer_comes_along(tree, tmp_path):
    root, hf, states = written(tmp_path, tree)
    summary = convert_legacy(root, tmp_path / "out", str(hf))
    assert not [note for note in summary.notes if "fp32 main weights" in note]
    description = describe(tmp_path / "out")
    assert (description["step"], description["optimizer"]) == (3, ["exp_avg", "exp_avg_sq", "param"])
    stored = read_dist_folder(tmp_path / "out")
    name = "language.head.norm.weight"
    with open_files() as pool:
        for kind in ("param", "exp_avg", "exp_avg_sq"):
            found = pool.read(stored.tensors[f"optimizer.state.{kind}.{name}"])
            assert torch.equal(found, states[kind]["model.language_model.norm.weight"])
    common = stored.read_common()
    groups = common["optimizer"]["optimizer"]["param_groups"]
    assert [(group["wd_mult"], group["step"]) for group in groups] == [(1.0, 7), (0.0, 7)]
    assert common["parts"]["schedule"] == {"finished_steps": 3}


def test_weights_alone(tmp_path):
    root, hf, _ = written(tmp_path, UNEVEN)
    convert_legacy(root, tmp_path / "out", str(hf), optimizer=False)
    assert describe(tmp_path / "out")["step"] == 0
    assert "optimizer" in json.loads((tmp_path / "out" / "manifest.json").read_text())["dropped"]
    export_checkpoint(tmp_path / "out", tmp_path / "exported")
    assert verify(tmp_path / "exported", hf).equal


def test_every_key_of_the_tree_is_accounted_for(tmp_path):
    root, hf, _ = written(tmp_path, UNEVEN)
    convert_legacy(root, tmp_path / "out", str(hf))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    weights = {name for name in manifest["tensors"] if not name.startswith("optimizer")}
    assert weights == set(stored_rules(load_shape(hf)))
    first = read_torch_file(next(root.rglob("mp_rank_00_000/model_optim_rng.pt"))).tree
    dropped = " ".join(manifest["dropped"])
    needless = [key for key in first["model"] if "_extra_state" in key or "inv_freq" in key]
    assert needless and all(key in dropped for key in needless)


def test_padding_of_vocabulary_and_vision_ffn_is_stripped(tmp_path):
    tree = Tree(tp=2, padded_vocabulary=trees.VOCABULARY + 8, padded_vision_ffn=56)
    exact = trees.write_hf_folder(tmp_path / "hf", vision_ffn=52)
    root = trees.write_tree(tmp_path / "tree", trees.rounded(exact), tree)
    convert_legacy(root, tmp_path / "out", str(tmp_path / "hf"))
    assert verify(tmp_path / "out", tmp_path / "hf").equal


def test_config_beside_the_tree_is_used(tmp_path):
    exact = trees.write_hf_folder(tmp_path / "hf")
    root = trees.write_tree(tmp_path / "tree", trees.rounded(exact), Tree())
    (root / "config.json").write_text((tmp_path / "hf" / "config.json").read_text())
    convert_legacy(root, tmp_path / "out")
    assert verify(tmp_path / "out", tmp_path / "hf").equal


def test_tree_that_does_not_tell_its_model(tmp_path):
    exact = trees.write_hf_folder(tmp_path / "hf")
    root = trees.write_tree(tmp_path / "tree", trees.rounded(exact), Tree(args={"num_layers": None}))
    with pytest.raises(ValueError, match="does not tell num_layers of its model; name the Hugging Face folder .*--hf"):
        convert_legacy(root, tmp_path / "out")


def test_config_is_derived_from_arguments_and_shapes(tmp_path, monkeypatch):
    """The tiny tower has 4 heads and tokens of its own; those of the published ones, all alike, are assumed."""
    from megatron_rb.checkpoint.legacy import config

    monkeypatch.setattr(config, "VISION_HEADS", trees.VISION_HEADS)
    exact = trees.write_hf_folder(tmp_path / "hf")
    raw = json.loads((tmp_path / "hf" / "config.json").read_text())
    monkeypatch.setattr(config, "SPECIAL_TOKENS", {name: raw[name] for name in config.SPECIAL_TOKENS})
    args = {"num_query_groups": 2, "group_query_attention": True, "mrope_section": [4, 2, 2]}
    tree = Tree(tp=2, pp=2, chunk_layers=((1,), (3,)), args={"decoder_first_pipeline_num_layers": 1, **args})
    root = trees.write_tree(tmp_path / "tree", trees.rounded(exact), tree)
    summary = convert_legacy(root, tmp_path / "out")
    assert any("config.json was derived" in note for note in summary.notes)
    ours, theirs = load_shape(tmp_path / "out" / "hf"), load_shape(tmp_path / "hf")
    assert ours.text == replace(theirs.text, max_positions=128000)
    assert ours.vision.num_layers == theirs.vision.num_layers and ours.vision.ffn_hidden_size == 52
    assert verify(tmp_path / "out", tmp_path / "hf").equal


def test_inspect_tells_what_a_tree_is(tmp_path):
    root, _, _ = written(tmp_path, UNEVEN)
    found = describe(root)
    assert (found["format"], found["step"], found["optimizer"]) == ("legacy Megatron checkpoint", 3, "yes")
    assert found["layout"] == {"tp": 2, "pp": 2, "virtual_chunks": 1} and found["args"]["num_layers"] == 4
    json.dumps(found)


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)


def test_flipped_byte_is_found_by_the_checksum_of_the_container(tmp_path):
    root, hf, _ = written(tmp_path, UNEVEN)
    victim = sorted(root.rglob("model_optim_rng.pt"))[2]
    tensor = read_torch_file(victim).tree["model"]["language_model.decoder.layers.0.mlp.linear_fc2.weight"]
    flip(victim, tensor.chunks[0].position + 11)
    with pytest.raises(ValueError, match=f"{victim.parent.name}/{victim.name}: .* does not have the checksum"):
        convert_legacy(root, tmp_path / "out", str(hf))
    assert not list(tmp_path.glob("out*"))


def test_flipped_byte_in_a_bin_file(tmp_path):
    exact = trees.write_hf_folder(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").unlink()
    victim = tmp_path / "hf" / "pytorch_model.bin"
    torch.save(trees.rounded(exact), victim)
    import_folder(tmp_path / "hf", tmp_path / "good")
    flip(victim, read_torch_file(victim).tree["lm_head.weight"].chunks[0].position)
    with pytest.raises(ValueError, match="pytorch_model.bin: .* does not have the checksum"):
        import_folder(tmp_path / "hf", tmp_path / "bad")


def test_missing_rank(tmp_path):
    exact = trees.write_hf_folder(tmp_path / "hf")
    root = trees.write_tree(tmp_path / "tree", trees.rounded(exact), UNEVEN)
    gone = next(root.rglob("mp_rank_01_001"))
    gone.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"lacks the folder of \(tp rank, pp rank\) \(1, 1\)"):
        convert_legacy(root, tmp_path / "out", str(tmp_path / "hf"))
    assert not list(tmp_path.glob("out*"))


def test_config_of_another_model(tmp_path):
    exact = trees.write_hf_folder(tmp_path / "hf")
    root = trees.write_tree(tmp_path / "tree", trees.rounded(exact), Tree())
    trees.write_hf_folder(tmp_path / "other", text_layers=3)
    with pytest.raises(ValueError, match="4.*3|3.*4"):
        convert_legacy(root, tmp_path / "out", str(tmp_path / "other"))


def test_folder_of_one_iteration(tmp_path: Path):
    root, hf, _ = written(tmp_path, UNEVEN)
    convert_legacy(next(root.glob("iter_*")), tmp_path / "out", str(hf))
    assert verify(tmp_path / "out", hf).equal
