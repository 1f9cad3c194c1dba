"""rb convert: what is imported and exported again is what was there, and what does not fit is refused in a sentence."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText

from megatron_rb.checkpoint.conversion.options import parse_size
from megatron_rb.checkpoint.hf.names import canonical_name
from megatron_rb.checkpoint.hf.side_files import copy_side_files
from megatron_rb.checkpoint.manifest import find_checkpoint, find_side_files
from megatron_rb.cli import main as rb
from tests.distributed.world import run_world
from tests.parity.tiny_models import write_model

CASES = {"qwen3_vl": 2, "qwen3_vl_tied": 1, "qwen2_5_vl": 2, "qwen2_5_vl_tied": 3, "qwen2_vl": 0, "qwen2_vl_tied": 1}
"""Seed of each tiny model; odd ones tie the embeddings."""


def convert(*arguments: object) -> int:
    return rb(["convert", *map(str, arguments)])


def tensors(folder) -> dict[str, torch.Tensor]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {canonical_name(name): file.get_tensor(name) for name in file.keys()}
    return found


def assert_equal_tensors(folder, other) -> None:
    ours, theirs = tensors(folder), tensors(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name].dtype != theirs[name].dtype] == []
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.fixture(scope="module", params=CASES)
def model(request, tmp_path_factory):
    """A tiny model on its way there and back: `hf`, `imported`, `exported`."""
    root = tmp_path_factory.mktemp(request.param)
    hf = write_model(root / "hf", request.param.removesuffix("_tied"), CASES[request.param])
    (hf / "tokenizer.json").write_text("{}")
    (hf / "chat_template.jinja").write_text("{{ messages }}")
    assert convert("import", "--hf", hf, "--out", root / "imported") == 0
    assert convert("export", "--ckpt", root / "imported", "--out", root / "exported") == 0
    return SimpleNamespace(hf=hf, imported=root / "imported", exported=root / "exported", family=request.param)


def test_exported_weights_are_the_imported_ones(model):
    assert_equal_tensors(model.exported, model.hf)


def test_everything_beside_the_weights_is_carried_along(model):
    names = {path.name for path in model.hf.iterdir()}
    assert {path.name for path in model.exported.iterdir()} == names | {"manifest.json"}
    assert (model.exported / "chat_template.jinja").read_text() == "{{ messages }}"
    assert json.loads((model.exported / "config.json").read_text()) == json.loads(
        (model.hf / "config.json").read_text()
    )


def test_names_are_those_of_published_folders(model):
    with safe_open(model.exported / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    prefixes = {".".join(name.split(".")[:2]) for name in names}
    if model.family.startswith("qwen3_vl"):
        assert prefixes - {"lm_head.weight"} == {"model.visual", "model.language_model"}
    else:
        assert {name.split(".")[0] for name in names} - {"lm_head"} == {"visual", "model"}
        assert "model.embed_tokens.weight" in names and "model.layers.0.self_attn.q_proj.weight" in names
    assert ("lm_head.weight" in names) == (not model.family.endswith("_tied"))


def test_transformers_loads_the_export_and_computes_the_same(model):
    logits = []
    for folder in (model.hf, model.exported):
        loaded, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        ids = torch.arange(20, 60)[None]
        with torch.no_grad():
            logits.append(loaded.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits)
    assert torch.equal(logits[0], logits[1])


def test_many_shards_hold_what_one_file_holds(model, tmp_path):
    assert convert("export", "--ckpt", model.imported, "--out", tmp_path / "out", "--max-shard-size", "200KB") == 0
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(shards) > 2 and set(index["weight_map"].values()) == set(shards)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors(model.hf).values())
    assert_equal_tensors(tmp_path / "out", model.hf)
    assert convert("import", "--hf", tmp_path / "out", "--out", tmp_path / "again") == 0


def test_type_is_converted_and_stated(model, tmp_path):
    assert convert("export", "--ckpt", model.imported, "--out", tmp_path / "bf16", "--dtype", "bf16") == 0
    original, halved = tensors(model.hf), tensors(tmp_path / "bf16")
    assert all(torch.equal(halved[name], value.bfloat16()) for name, value in original.items())
    config = json.loads((tmp_path / "bf16" / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"


def test_checkpoints_of_every_layout_are_interchangeable(tmp_path):
    models = []
    for family, seed in (("qwen3_vl", 1), ("qwen2_5_vl", 4)):  # one tied, one whose vision size 53 is padded
        hf = write_model(tmp_path / f"{family}-hf", family, seed)
        assert convert("import", "--hf", hf, "--out", tmp_path / f"{family}-imported") == 0
        imported, saved = tmp_path / f"{family}-imported", tmp_path / f"{family}-saved"
        models.append({"hf": str(hf), "imported": str(imported), "saved": str(saved)})
    for results in run_world("tests.distributed.cases_convert:load_and_save", 2, timeout=300, models=models):
        assert [case for case in results if case["differing"]] == []
        assert len(results) == 4 and all(case["compared"] > 10 for case in results)
    for model in models:
        for layout in ("tp2", "pp2"):
            saved, out = f"{model['saved']}-{layout}", tmp_path / f"{layout}-{len(list(tmp_path.iterdir()))}"
            assert convert("export", "--ckpt", saved, "--hf", model["hf"], "--out", out) == 0
            assert_equal_tensors(out, tmp_path / model["hf"])


class TestRefusals:
    @pytest.fixture(scope="class")
    def made(self, tmp_path_factory):
        root = tmp_path_factory.mktemp("refusals")
        hf = write_model(root / "hf", "qwen3_vl", 0)
        assert convert("import", "--hf", hf, "--out", root / "ckpt") == 0
        return SimpleNamespace(hf=hf, ckpt=root / "ckpt")

    @pytest.fixture
    def refused(self, capsys):
        def run(words: str, *arguments: object) -> None:
            assert convert(*arguments) == 2
            assert words in " ".join(capsys.readouterr().err.split())

        return run

    def test_taken_out(self, made, refused, tmp_path):
        (tmp_path / "note").write_text("mine")
        refused("exists already", "import", "--hf", made.hf, "--out", tmp_path)
        refused("exists already", "export", "--ckpt", made.ckpt, "--out", tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["note"]

    def test_unknown_type_and_size(self, made, refused, tmp_path):
        refused("use keep, fp32 or bf16", "import", "--hf", made.hf, "--out", tmp_path / "a", "--dtype", "fp8")
        size = ("--max-shard-size", "big")
        refused("write it like 5GB", "export", "--ckpt", made.ckpt, "--out", tmp_path / "a", *size)

    def test_no_checkpoint(self, refused, tmp_path):
        refused("there is no checkpoint folder", "export", "--ckpt", tmp_path / "none", "--out", tmp_path / "a")
        refused("is neither a checkpoint nor", "export", "--ckpt", tmp_path, "--out", tmp_path / "a")

    def test_another_model(self, made, refused, tmp_path):
        other = write_model(tmp_path / "other", "qwen3_vl", 3)
        words = "is a checkpoint of another model: text."
        refused(words, "export", "--ckpt", made.ckpt, "--hf", other, "--out", tmp_path / "a")

    def test_missing_shard_of_a_folder(self, made, refused, tmp_path):
        sharded = tmp_path / "sharded"
        assert convert("export", "--ckpt", made.ckpt, "--out", sharded, "--max-shard-size", "200KB") == 0
        shard = sorted(sharded.glob("*.safetensors"))[1]
        shard.write_bytes(shard.read_bytes()[:-100])
        refused("is cut off", "import", "--hf", sharded, "--out", tmp_path / "a")
        shard.unlink()
        refused(f"lacks {shard.name}", "import", "--hf", sharded, "--out", tmp_path / "a")
        assert not list(tmp_path.glob("a*"))

    def test_missing_files_of_a_checkpoint(self, made, refused, tmp_path):
        broken = shutil.copytree(made.ckpt, tmp_path / "broken")
        shutil.rmtree(broken / "hf")
        refused("name their Hugging Face folder with --hf", "export", "--ckpt", broken, "--out", tmp_path / "a")
        next(broken.glob("*.distcp")).unlink()
        refused("1 of its files are missing", "export", "--ckpt", broken, "--hf", made.hf, "--out", tmp_path / "a")


def test_run_folder_means_its_newest_checkpoint(tmp_path):
    hf = write_model(tmp_path / "source", "qwen3_vl", 0)
    checkpoints = tmp_path / "run" / "checkpoints"
    for name in ("step_00000020", "step_00000040", "step_00000060.writing-0badcafe"):
        (checkpoints / name).mkdir(parents=True)
    copy_side_files(hf, checkpoints / "hf")
    newest = checkpoints / "step_00000040"
    assert find_checkpoint(tmp_path / "run") == find_checkpoint(checkpoints) == newest
    assert find_side_files(newest, "") == checkpoints / "hf"
    assert not list((checkpoints / "hf").glob("*.safetensors"))


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("2GiB", 2 * 2**30), ("1.5MB", 1_500_000), ("7", 7)])
def test_sizes_are_read(text, size):
    assert parse_size(text) == size
