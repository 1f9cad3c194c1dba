"""Folders as people store them: tied heads, shards without an index, buffers; each means what transformers reads."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from megatron_rb.checkpoint.conversion.describe import describe
from megatron_rb.checkpoint.conversion.export_hf import export_checkpoint
from megatron_rb.checkpoint.conversion.import_hf import import_folder
from megatron_rb.checkpoint.conversion.verify import verify
from megatron_rb.checkpoint.hf.reader import HFReader
from megatron_rb.shapes.shape import load_shape
from tests.parity.tiny_models import write_model

EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
TIED = {"qwen3_vl": 1, "qwen2_5_vl": 3}
"""Seed of a tiny model of each family with tied embeddings."""
PUBLISHED_NAME = {"qwen3_vl": EMBEDDING, "qwen2_5_vl": "model.embed_tokens.weight"}


def tied(folder: Path, family: str, change) -> Path:
    """A folder whose tensors `change(tensors, name of the embedding)` has rewritten."""
    write_model(folder, family, TIED[family])
    tensors = load_file(folder / "model.safetensors")
    change(tensors, PUBLISHED_NAME[family])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def as_head(tensors, embedding):
    tensors[HEAD] = tensors.pop(embedding)


def as_both(tensors, embedding):
    tensors[HEAD] = tensors[embedding].clone()


def as_both_in_two_types(tensors, embedding):
    tensors[embedding] = tensors[embedding].bfloat16()
    tensors[HEAD] = tensors[embedding].float()


def as_zeros_of_two_signs(tensors, embedding):
    tensors[embedding][0] = 0.0
    tensors[HEAD] = tensors[embedding].clone()
    tensors[HEAD][0] = -0.0


WAYS = [as_head, as_both, as_both_in_two_types, as_zeros_of_two_signs]


@pytest.mark.parametrize("family", TIED)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_tied_embedding_under_any_of_its_names(tmp_path, family, way):
    folder = tied(tmp_path / "hf", family, way)
    import_folder(folder, tmp_path / "ckpt")
    export_checkpoint(tmp_path / "ckpt", tmp_path / "out")
    stored = load_file(folder / "model.safetensors")
    wanted = stored.get(PUBLISHED_NAME[family], stored[HEAD])
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[PUBLISHED_NAME[family]], wanted)
    assert torch.equal(HFReader(folder, load_shape(folder)).read("language.embedding.tokens.weight"), wanted)
    assert verify(folder, tmp_path / "ckpt").equal
    assert describe(folder)["tied_embeddings"]


@pytest.mark.parametrize("family", TIED)
def test_transformers_reads_a_head_alone_as_both(tmp_path, family):
    folder = tied(tmp_path / "hf", family, as_head)
    loaded, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    found = HFReader(folder, load_shape(folder)).read("language.head.output.weight")
    assert torch.equal(found, loaded.lm_head.weight.detach())


def other_values(tensors, embedding):
    tensors[HEAD] = tensors[embedding] + 1


def other_shape(tensors, embedding):
    tensors[HEAD] = tensors[embedding][:-1].clone()


@pytest.mark.parametrize("way", [other_values, other_shape], ids=lambda way: way.__name__)
def test_tied_head_that_is_another_is_refused_by_every_reader(tmp_path, way):
    folder = tied(tmp_path / "hf", "qwen3_vl", way)
    good = write_model(tmp_path / "good", "qwen3_vl", TIED["qwen3_vl"])
    words = "says tie_word_embeddings, but its lm_head.weight is not"
    for read in (
        lambda: import_folder(folder, tmp_path / "out"),
        lambda: HFReader(folder, load_shape(folder)).read("language.embedding.tokens.weight"),
        lambda: verify(good, folder),
    ):
        with pytest.raises(ValueError, match=words):
            read()


def test_head_missing_though_it_is_not_tied_is_refused(tmp_path):
    folder = write_model(tmp_path / "hf", "qwen3_vl", 0)
    tensors = load_file(folder / "model.safetensors")
    del tensors[HEAD]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 tensors are missing \(lm_head.weight\)"):
        import_folder(folder, tmp_path / "out")


# Shards


def numbered(folder: Path, count: int, pickled: bool = False) -> list[Path]:
    """Cut the weights of a folder into numbered files without an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, paths = list(tensors), []
    for number in range(count):
        part = {name: tensors[name] for name in names[number::count]}
        kind = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
        paths.append(folder / f"{kind[0]}-{number + 1:05d}-of-{count:05d}.{kind[1]}")
        torch.save(part, paths[-1]) if pickled else save_file(part, paths[-1], metadata={"format": "pt"})
    return paths


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize("count", [1, 3])
def test_numbered_files_without_an_index_are_read(tmp_path, count, pickled):
    good, folder = (write_model(tmp_path / name, "qwen3_vl", 0) for name in ("good", "hf"))
    numbered(folder, count, pickled)
    import_folder(folder, tmp_path / "ckpt")
    assert verify(good, tmp_path / "ckpt").equal


def test_numbered_file_that_is_missing_is_named(tmp_path):
    folder = write_model(tmp_path / "hf", "qwen3_vl", 0)
    numbered(folder, 4)[2].unlink()
    with pytest.raises(ValueError, match="has no index, and of its 4 shards number 3 is missing"):
        import_folder(folder, tmp_path / "out")


def test_numbered_files_of_two_sets_are_refused(tmp_path):
    folder = write_model(tmp_path / "hf", "qwen3_vl", 0)
    shard = numbered(folder, 2)[0]
    shard.with_name("model-00001-of-00001.safetensors").write_bytes(shard.read_bytes())
    with pytest.raises(ValueError, match="shards of several sets .model-.-of-00001.safetensors, model-"):
        import_folder(folder, tmp_path / "out")


# Buffers, and tensors that the user allows to be dropped


def with_extra(folder: Path, extra: dict[str, torch.Tensor], family: str = "qwen2_5_vl") -> Path:
    write_model(folder, family, 0)
    tensors = load_file(folder / "model.safetensors") | extra
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


BUFFERS = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(8) for n in range(4)} | {
    "model.rotary_emb.inv_freq": torch.ones(8),
    "visual.rotary_pos_emb.inv_freq": torch.ones(4),
    "model.layers.0.self_attn.rotary_emb.cos_cached": torch.ones(4),
    "visual.blocks.0.attn.proj._extra_state": torch.ones(4, dtype=torch.uint8),
}


def test_buffers_are_left_out_by_rule(tmp_path):
    folder = with_extra(tmp_path / "hf", BUFFERS)
    summary = import_folder(folder, tmp_path / "ckpt")
    assert json.loads((tmp_path / "ckpt" / "manifest.json").read_text())["dropped"].keys() == BUFFERS.keys()
    assert any("left out: a buffer that is computed from the configuration" in note for note in summary.notes)


def test_buffers_do_not_matter_to_other_readers(tmp_path):
    folder = with_extra(tmp_path / "hf", BUFFERS)
    import_folder(folder, tmp_path / "ckpt")
    assert verify(folder, tmp_path / "ckpt").equal
    assert HFReader(folder, load_shape(folder)).read("language.head.norm.weight").numel()
    assert describe(folder)["parameters"] == describe(tmp_path / "ckpt")["parameters"]


def test_pattern_drops_all_that_it_fits(tmp_path):
    extra = {f"value_head.{n}.weight": torch.ones(2) for n in range(3)}
    folder = with_extra(tmp_path / "hf", extra)
    import_folder(folder, tmp_path / "ckpt", allow_drop=["value_head.*"])
    assert json.loads((tmp_path / "ckpt" / "manifest.json").read_text())["dropped"].keys() == extra.keys()


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("*.wieght", r"--allow-drop \*.wieght: .* has no such tensor"),
        ("model.norm.weight", "--allow-drop model.norm.weight: model.norm.weight is part of the model"),
        ("*.input_layernorm.*", r"is part of the model and cannot be left out"),
    ],
)
def test_pattern_that_drops_nothing_is_refused(tmp_path, pattern, words):
    folder = with_extra(tmp_path / "hf", {})
    with pytest.raises(ValueError, match=words):
        import_folder(folder, tmp_path / "out", allow_drop=[pattern])


def test_unknown_tensor_is_still_refused(tmp_path):
    folder = with_extra(tmp_path / "hf", {"model.layers.0.self_attn.inv_freqs": torch.ones(2)})
    with pytest.raises(ValueError, match="inv_freqs.*--allow-drop, by name or by a pattern"):
        import_folder(folder, tmp_path / "out")
