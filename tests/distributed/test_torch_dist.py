"""`torch_dist` checkpoints that megatron-core itself wrote become the Hugging Face folder they were filled from."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_rb.checkpoint.conversion.describe import describe
from megatron_rb.checkpoint.conversion.export_hf import export_checkpoint
from megatron_rb.checkpoint.conversion.from_megatron import convert_megatron
from megatron_rb.checkpoint.conversion.verify import verify
from megatron_rb.checkpoint.storage.torch_dist import read_dist_folder
from megatron_rb.cli import main as rb
from tests.distributed.world import run_world
from tests.parity.tiny_models import write_model

MODELS = {"qwen2_5_vl": 0, "qwen2_5_vl tied": 21, "qwen3_vl": 2, "qwen3_vl tied": 3}
"""Seed of each tiny model, all of four layers; odd ones tie the embeddings."""
ONE, MANY = (1, 1), (2, 2)
CASES = {
    "Bridge, Qwen2.5-VL": {"model": "qwen2_5_vl", "tower": "visual", "layout": MANY},
    "Bridge, Qwen2.5-VL, tied": {"model": "qwen2_5_vl tied", "tower": "visual", "layout": MANY},
    "Pai, Qwen2.5-VL": {"model": "qwen2_5_vl", "tower": "pai", "layout": MANY, "padded_vocabulary": 160},
    "Pai, Qwen2.5-VL, numbered layers": {"model": "qwen2_5_vl", "tower": "pai", "layout": MANY, "numbered": True},
    "Bridge, Qwen3-VL": {"model": "qwen3_vl", "tower": "bridge", "layout": MANY},
    "Bridge, Qwen3-VL, tied, numbered layers": {
        "model": "qwen3_vl tied",
        "tower": "bridge",
        "layout": MANY,
        "numbered": True,
    },
    "Bridge, Qwen3-VL, first releases": {"model": "qwen3_vl", "tower": "vision_model", "layout": MANY},
    "Pai, Qwen3-VL": {"model": "qwen3_vl", "tower": "pai", "layout": MANY},
    "one rank, with optimizer": {"model": "qwen2_5_vl", "tower": "pai", "layout": ONE, "optimizer": True},
    "one rank, wrapped": {"model": "qwen3_vl", "tower": "bridge", "layout": ONE, "prefix": "module."},
    "gate and up apart": {"model": "qwen2_5_vl", "tower": "pai", "layout": MANY, "singleton": True},
    "one rank, fp32": {"model": "qwen3_vl", "tower": "bridge", "layout": ONE, "dtype": "fp32"},
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the Hugging Face folder (`hf/MODEL DTYPE`) and the checkpoint of every case."""
    root = tmp_path_factory.mktemp("torch_dist")
    for layout in (ONE, MANY):
        cases = {
            name: {"numbered": False, "padded_vocabulary": 0} | case | {"hf": str(source(root, case))}
            for name, case in CASES.items()
            if case["layout"] == layout
        }
        function = "tests.distributed.cases_torch_dist:write_checkpoints"
        run_world(function, layout[0] * layout[1], 200, root=str(root), cases=cases, tp=layout[0], pp=layout[1])
    return root


def source(root: Path, case: dict) -> Path:
    """The tiny model that a case is filled from; four layers, so that two stages are even."""
    folder = root / "hf" / f"{case['model']} {case.get('dtype', 'bf16')}"
    if not folder.exists():
        family, _, _ = case["model"].partition(" ")
        write_model(folder, family, MODELS[case["model"]])
        if case.get("dtype", "bf16") == "bf16":
            tensors = {name: value.bfloat16() for name, value in load_file(folder / "model.safetensors").items()}
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    return folder


@pytest.mark.parametrize("name", CASES)
def test_weights_are_those_of_the_hugging_face_folder(written: Path, tmp_path: Path, name: str):
    hf = source(written, CASES[name])
    convert_megatron(written / name, tmp_path / "out", str(hf))
    assert verify(tmp_path / "out", hf).equal


def test_what_was_saved_is_of_the_kind_that_the_case_names(written: Path):
    """The trees above would prove nothing if megatron-core had written other names."""
    names = {name: set(read_dist_folder(written / name / "iter_0000007").tensors) for name in CASES}
    stacked = "decoder.layers.self_attention.linear_qkv.weight"
    assert f"language_model.{stacked}" in names["Bridge, Qwen2.5-VL"]
    assert "visual.blocks.0.attn.qkv.weight" in names["Bridge, Qwen2.5-VL"]
    assert f"vision_model.{stacked}" in names["Pai, Qwen2.5-VL"]
    assert f"language_model.{stacked.replace('layers', 'layers.3')}" in names["Pai, Qwen2.5-VL, numbered layers"]
    assert "vision_model.decoder.deepstack_merger_list.patch_norm.weight" in names["Bridge, Qwen3-VL"]
    assert "vision_model.decoder.deepstack_norm_list.2.weight" in names["Pai, Qwen3-VL"]
    assert any(key.startswith("optimizer.") for key in names["one rank, with optimizer"])
    assert "language_model.decoder.layers.3.mlp.linear_fc1.weight_v" in names["gate and up apart"]
    assert f"module.language_model.{stacked}" in names["one rank, wrapped"]


def test_export_is_the_source_byte_for_byte(written: Path, tmp_path: Path):
    name = "Bridge, Qwen3-VL, tied, numbered layers"
    hf = source(written, CASES[name])
    convert_megatron(written / name / "iter_0000007", tmp_path / "ckpt", str(hf))
    export_checkpoint(tmp_path / "ckpt", tmp_path / "out")
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", hf))
    assert ours.keys() == theirs.keys()
    assert [n for n in ours if not torch.equal(ours[n].view(torch.uint8), theirs[n].view(torch.uint8))] == []


def test_manifest_tells_source_and_what_was_left_out(written: Path, tmp_path: Path):
    name = "one rank, with optimizer"
    summary = convert_megatron(written / name, tmp_path / "out", str(source(written, CASES[name])))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["source"]["format"], manifest["source"]["iteration"]) == ("torch_dist", 7)
    assert any(note.startswith("optimizer") and "the weights alone are read" in note for note in summary.notes)
    assert describe(tmp_path / "out")["step"] == 0 and describe(tmp_path / "out")["optimizer"] == []
    found = read_dist_folder(written / name / "iter_0000007")
    named = {key for keys in manifest["key_map"].values() for key in keys} | set(manifest["dropped"])
    assert (found.tensors.keys() | found.objects.keys()) - named == set()


def test_padding_of_the_vocabulary_is_named(written: Path, tmp_path: Path):
    name = "Pai, Qwen2.5-VL"
    convert_megatron(written / name, tmp_path / "out", str(source(written, CASES[name])))
    dropped = json.loads((tmp_path / "out" / "manifest.json").read_text())["dropped"]
    assert [reason for key, reason in dropped.items() if "word_embeddings" in key] == ["32 rows of padding"]


def test_command_line_reads_both_formats(written: Path, tmp_path: Path):
    name = "one rank, fp32"
    hf = source(written, CASES[name])
    command = ["convert", "from-megatron", "--ckpt", written / name, "--hf", hf, "--out", tmp_path / "out"]
    assert rb([*map(str, command)]) == 0
    assert describe(tmp_path / "out")["dtypes"].keys() == {"float32"}


class TestRefusals:
    @pytest.fixture
    def folder(self, written: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(written / "one rank, wrapped", tmp_path / "foreign"))

    @pytest.fixture
    def refused(self, folder: Path, tmp_path: Path):
        def convert(words: str, hf: Path | str = "", **options) -> None:
            with pytest.raises(ValueError, match=words):
                convert_megatron(folder, tmp_path / "out", str(hf), **options)
            assert not (tmp_path / "out").exists()

        return convert

    def test_no_config(self, refused):
        refused("without a config.json; name the Hugging Face folder .* with --hf")

    def test_another_model(self, refused, tmp_path):
        refused("was trained with num_layers 4 instead of 5", write_model(tmp_path / "hf", "qwen3_vl", 1))

    def test_another_family(self, refused, written):
        other = source(written, CASES["Bridge, Qwen2.5-VL"])
        refused("was trained with|does not have|has the shape", other)

    def test_missing_file(self, refused, folder, written):
        next(folder.rglob("*.distcp")).unlink()
        refused("of its files are missing", source(written, CASES["one rank, wrapped"]))

    def test_pattern_that_drops_nothing(self, refused, written):
        hf = source(written, CASES["one rank, wrapped"])
        refused(r"--allow-drop \*.wieght: .* has no such tensor", hf, allow_drop=["*.wieght"])
        refused(r"--allow-drop \*.weight: .* is part of the model", hf, allow_drop=["*.weight"])

    def test_another_backend(self, refused, folder, written):
        (folder / "iter_0000007" / "metadata.json").write_text('{"sharded_backend": "zarr"}')
        refused("of the format zarr; torch_dist is read", source(written, CASES["one rank, wrapped"]))

    def test_norms_stored_as_gamma_minus_one(self, refused, folder, written):
        (folder / "iter_0000007" / "run_config.yaml").write_text("model:\n  layernorm_zero_centered_gamma: true\n")
        refused("stores norm weights as gamma - 1", source(written, CASES["one rank, wrapped"]))


def test_inspect_describes_a_foreign_checkpoint(written: Path):
    description = describe(written / "one rank, with optimizer")
    assert description["format"] == "distributed Megatron checkpoint (torch_dist)"
    assert (description["step"], description["optimizer"], description["dtypes"].keys()) == (7, "yes", {"bfloat16"})
    assert description["args"]["num_layers"] == 4
