"""fp8 with block scales becomes the values that transformers computes; every other quantised storage is refused."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from megatron_rb.checkpoint.conversion.describe import describe
from megatron_rb.checkpoint.conversion.export_hf import export_checkpoint
from megatron_rb.checkpoint.conversion.import_hf import import_folder
from megatron_rb.checkpoint.conversion.verify import verify
from megatron_rb.checkpoint.hf.reader import HFReader
from megatron_rb.shapes.shape import load_shape
from tests.parity.tiny_models import write_model

Q_PROJ = "model.language_model.layers.0.self_attn.q_proj.weight"
FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"}
"""What the published Qwen3-VL-*-FP8 folders say beside their block size and the modules they exempt."""


def rewrite(folder: Path, tensors=None, **config) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    if tensors is not None:
        content = {name: value.contiguous() for name, value in tensors.items()}
        save_file(content, folder / "model.safetensors", metadata={"format": "pt"})


def is_linear(name: str) -> bool:
    return ".language_model.layers." in name and name.endswith("_proj.weight")


def blocks_of(weight: torch.Tensor, block: tuple[int, int]):
    """`(row of the grid, column of the grid, block)` of a matrix; the last ones may be smaller."""
    for row, rows in enumerate(weight.split(block[0])):
        for column, part in enumerate(rows.split(block[1], 1)):
            yield row, column, part


def quantised(weight: torch.Tensor, block: tuple[int, int], scale_dtype: torch.dtype):
    """fp8 values, their scales, and the products taken block by block in fp32."""
    grid = torch.zeros(math.ceil(weight.shape[0] / block[0]), math.ceil(weight.shape[1] / block[1]))
    stored, values = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty_like(weight, dtype=torch.float32)
    places = blocks_of(stored, block), blocks_of(values, block)
    for (row, column, part), (_, _, into), (_, _, value) in zip(blocks_of(weight, block), *places, strict=True):
        scale = (part.float().abs().max() / 448).to(scale_dtype).float()
        grid[row, column] = scale
        into.copy_((part.float() / scale).to(torch.float8_e4m3fn))
        value.copy_(into.float() * scale)
    return stored, grid.to(scale_dtype), values


def fp8_folder(root: Path, block=(32, 20), scale_dtype=torch.bfloat16, **settings):
    """A tiny Qwen3-VL whose decoder's linear layers are fp8, and its fp32 values by name."""
    folder = write_model(root / "fp8", "qwen3_vl", 0)
    tensors, values = {}, {}
    for name, value in load_file(folder / "model.safetensors").items():
        value = value.bfloat16()
        if is_linear(name):
            tensors[name], tensors[f"{name}_scale_inv"], values[name] = quantised(value, block, scale_dtype)
        else:
            tensors[name], values[name] = value, value.float()
    config = FP8 | {"weight_block_size": list(block), "modules_to_not_convert": ["model.visual", "lm_head"]} | settings
    rewrite(folder, tensors, quantization_config=config, dtype="bfloat16")
    return folder, values


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("block", [(32, 20), (128, 128), (16, 1)], ids=str)
def test_fp8_becomes_its_products_rounded_once(tmp_path, block, scale_dtype):
    folder, values = fp8_folder(tmp_path, block, scale_dtype)
    summary = import_folder(folder, tmp_path / "ckpt")
    export_checkpoint(tmp_path / "ckpt", tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert [name for name, value in found.items() if not torch.equal(value, values[name].bfloat16())] == []
    assert any("fp8 tensors were multiplied with their block scales in fp32" in note for note in summary.notes)


def test_fp8_as_fp32_keeps_every_digit_of_the_products(tmp_path):
    folder, values = fp8_folder(tmp_path)
    import_folder(folder, tmp_path / "ckpt", dtype="fp32")
    export_checkpoint(tmp_path / "ckpt", tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert [name for name, value in found.items() if not torch.equal(value, values[name])] == []


def test_values_are_those_of_transformers(tmp_path):
    folder, _ = fp8_folder(tmp_path, block=(16, 16))
    stored = load_file(folder / "model.safetensors")
    reader = HFReader(folder, load_shape(folder))
    even = [n for n in stored if is_linear(n) and not any(size % 16 for size in stored[n].shape)]
    assert len(even) > 10  # transformers reads no blocks that are cut off
    for name in even:
        theirs = Fp8Dequantize(None)._dequantize_one(stored[name], stored[f"{name}_scale_inv"], torch.bfloat16)
        assert torch.equal(reader.read_hf(name), theirs)


def test_a_run_starts_from_the_values_that_import_writes(tmp_path):
    folder, values = fp8_folder(tmp_path)
    found = HFReader(folder, load_shape(folder)).read("language.layers.1.attention.linear_proj.weight")
    assert torch.equal(found, values["model.language_model.layers.1.self_attn.o_proj.weight"].bfloat16())


def test_many_blocks_of_memory_make_up_one_matrix(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_rb.checkpoint.conversion.stream.ROW_BYTES_LIMIT", 200)
    monkeypatch.setattr("megatron_rb.checkpoint.storage.block_scales.ROW_BYTES_LIMIT", 200)
    folder, values = fp8_folder(tmp_path)
    import_folder(folder, tmp_path / "ckpt")
    export_checkpoint(tmp_path / "ckpt", tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert [name for name, value in found.items() if not torch.equal(value, values[name].bfloat16())] == []
    assert torch.equal(HFReader(folder, load_shape(folder)).read_hf(Q_PROJ), values[Q_PROJ].bfloat16())


def test_one_scale_for_a_whole_tensor(tmp_path):
    folder, values = fp8_folder(tmp_path, block=(1 << 20, 1 << 20), weight_block_size=None)
    tensors = load_file(folder / "model.safetensors")
    rewrite(folder, {n: v.reshape(()) if n.endswith("_scale_inv") else v for n, v in tensors.items()})
    assert torch.equal(HFReader(folder, load_shape(folder)).read_hf(Q_PROJ), values[Q_PROJ].bfloat16())


@pytest.mark.parametrize("block", [(1 << 20, 1 << 20), (128, 128), (16, 8)], ids=str)
def test_block_size_that_the_config_does_not_state(tmp_path, block):
    """It is that of the scales, as in transformers."""
    folder, values = fp8_folder(tmp_path, block)
    rewrite(folder, quantization_config=FP8)
    name = "model.language_model.layers.0.mlp.gate_proj.weight"
    assert not values[name].shape[0] % 16 and not values[name].shape[1] % 8
    assert torch.equal(HFReader(folder, load_shape(folder)).read_hf(name), values[name].bfloat16())


def test_verify_compares_values(tmp_path):
    folder, _ = fp8_folder(tmp_path)
    import_folder(folder, tmp_path / "ckpt")
    assert verify(folder, tmp_path / "ckpt").equal
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{Q_PROJ}_scale_inv"][-1, -1] *= 2
    rewrite(folder, tensors)
    assert [difference.name for difference in verify(folder, tmp_path / "ckpt").differences] == [Q_PROJ]


def test_what_is_made_of_fp8_says_nothing_of_quantisation(tmp_path):
    folder, _ = fp8_folder(tmp_path)
    import_folder(folder, tmp_path / "ckpt")
    export_checkpoint(tmp_path / "ckpt", tmp_path / "out", hf=str(folder))
    for config in (tmp_path / "ckpt" / "hf" / "config.json", tmp_path / "out" / "config.json"):
        assert "quantization_config" not in json.loads(config.read_text())
    assert "quantization_config" in json.loads((folder / "config.json").read_text())


def test_the_manifest_names_scales_among_the_sources(tmp_path):
    folder, _ = fp8_folder(tmp_path)
    import_folder(folder, tmp_path / "ckpt")
    manifest = json.loads((tmp_path / "ckpt" / "manifest.json").read_text())
    proj = "model.language_model.layers.0.self_attn.o_proj.weight"
    name = "language.layers.0.attention.linear_proj.weight"
    assert manifest["key_map"][name] == [proj, f"{proj}_scale_inv"]
    assert manifest["tensors"][name]["sources"].keys() == {proj, f"{proj}_scale_inv"}


def test_inspect_tells_how_fp8_is_stored(tmp_path):
    folder, values = fp8_folder(tmp_path)
    assert describe(folder)["dtypes"]["float8_e4m3fn"] == sum(map(is_linear, values))


def without_scales(tensors, config):
    return {n: v for n, v in tensors.items() if not n.endswith("_scale_inv")}, config


def other_block(tensors, config):
    return tensors, config | {"weight_block_size": [8, 8]}


def exempt_but_stored(tensors, config):
    return tensors, config | {"modules_to_not_convert": ["model.layers.0.self_attn.q_proj"]}


def scale_alone(tensors, config):
    return tensors | {Q_PROJ: tensors[Q_PROJ].bfloat16()}, config


def exponent_scales(tensors, config):
    scales = {n: torch.full(v.shape, 127, dtype=torch.uint8) for n, v in tensors.items() if n.endswith("_scale_inv")}
    return tensors | scales, config | {"scale_fmt": "ue8m0"}


FP8_FAULTS = [
    (without_scales, r"stores .*_proj\.weight as fp8 without its scales .*_scale_inv"),
    (other_block, r"needs \[.*\] scales for blocks of 8 x 8, .*_scale_inv has"),
    (exempt_but_stored, f"stores {Q_PROJ} as fp8, but its config.json lists that module under modules_to_not_convert"),
    (scale_alone, f"holds quantised weights with fp8 .{Q_PROJ}_scale_inv is stored as bfloat16"),
    (exponent_scales, "with scales of type uint8; this stack reads"),
]


@pytest.mark.parametrize(("spoil", "words"), FP8_FAULTS, ids=lambda value: getattr(value, "__name__", ""))
def test_fp8_that_does_not_fit_is_refused(tmp_path, spoil, words):
    folder, _ = fp8_folder(tmp_path)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    tensors, config = spoil(load_file(folder / "model.safetensors"), config)
    rewrite(folder, tensors, quantization_config=config)
    refused_everywhere(folder, words, tmp_path)


def refused_everywhere(folder: Path, words: str, tmp_path: Path) -> None:
    good = write_model(tmp_path / "good", "qwen3_vl", 0)
    readers = {
        "import": lambda: import_folder(folder, tmp_path / "out"),
        "cast": lambda: import_folder(folder, tmp_path / "out", dtype="bf16"),
        "run": lambda: HFReader(folder, load_shape(folder)),
        "verify": lambda: verify(good, folder),
        "inspect": lambda: describe(folder),
    }
    for name, read in readers.items():
        with pytest.raises(ValueError, match=words):
            pytest.fail(f"{name} took it: {read()}")
    assert not (tmp_path / "out").exists()


def int8(tensors):
    return tensors | {Q_PROJ: tensors[Q_PROJ].to(torch.int8)}


def bitsandbytes(tensors):
    return int8(tensors) | {Q_PROJ.replace("weight", "SCB"): torch.ones(4)}


def bitsandbytes_4bit(tensors):
    packed = {Q_PROJ: torch.zeros(8, 1, dtype=torch.uint8), f"{Q_PROJ}.absmax": torch.ones(2)}
    return tensors | packed | {f"{Q_PROJ}.quant_state.bitsandbytes__nf4": torch.zeros(9, dtype=torch.uint8)}


def gptq(tensors):
    module = Q_PROJ.removesuffix("weight")
    packed = {f"{module}qweight": torch.zeros(4, 4, dtype=torch.int32), f"{module}scales": torch.ones(4, 4)}
    return {name: value for name, value in tensors.items() if name != Q_PROJ} | packed


def packed(tensors):
    module = Q_PROJ.removesuffix("weight")
    parts = {f"{module}weight_packed": torch.zeros(4, 4, dtype=torch.uint8), f"{module}weight_scale": torch.ones(4, 1)}
    return {name: value for name, value in tensors.items() if name != Q_PROJ} | parts


def fp8_dynamic(tensors):
    scale = {Q_PROJ.replace("weight", "weight_scale"): torch.ones(len(tensors[Q_PROJ]), 1)}
    return tensors | {Q_PROJ: tensors[Q_PROJ].to(torch.float8_e4m3fn)} | scale


def fp8_alone(tensors):
    return tensors | {Q_PROJ: tensors[Q_PROJ].to(torch.float8_e5m2)}


STORAGES = [int8, bitsandbytes, bitsandbytes_4bit, gptq, packed, fp8_dynamic, fp8_alone]
METHODS = ["bitsandbytes", "gptq", "awq", "compressed-tensors", "mxfp4", "nvfp4", "modelopt", "torchao", "fbgemm_fp8"]


@pytest.mark.parametrize("store", STORAGES, ids=lambda store: store.__name__)
def test_quantised_storage_is_refused_by_tensor_though_the_config_is_silent(tmp_path, store):
    folder = write_model(tmp_path / "hf", "qwen3_vl", 0)
    rewrite(folder, store(load_file(folder / "model.safetensors")))
    refused_everywhere(folder, r"holds quantised weights.*\(model.*self_attn.q_proj.* is stored as", tmp_path)


@pytest.mark.parametrize("method", METHODS)
def test_quantised_storage_is_refused_by_the_method_of_the_config(tmp_path, method):
    folder = write_model(tmp_path / "hf", "qwen3_vl", 0)
    config = {"quantization_config": {"quant_method": method}}
    rewrite(folder, gptq(load_file(folder / "model.safetensors")), **config)
    refused_everywhere(folder, f"holds weights quantised with {method} .*q_proj.*dequantise it", tmp_path)


def test_statement_of_quantisation_beside_plain_weights_is_refused(tmp_path):
    folder = write_model(tmp_path / "hf", "qwen3_vl", 0)
    rewrite(folder, quantization_config={"load_in_4bit": True})
    refused_everywhere(folder, "quantised with bitsandbytes, but they are stored plainly; delete quant", tmp_path)


@pytest.mark.parametrize("place", ["text_config", "compression_config"])
def test_other_places_of_the_statement_are_read(tmp_path, place):
    folder = write_model(tmp_path / "hf", "qwen3_vl", 0)
    config = json.loads((folder / "config.json").read_text())
    said = {"quant_method": "awq"}
    inner = config["text_config"] | {"quantization_config": said} if place == "text_config" else said
    rewrite(folder, **{place: inner})
    refused_everywhere(folder, "quantised with awq", tmp_path)


def test_pickled_weights_are_looked_at_as_well(tmp_path):
    folder = write_model(tmp_path / "hf", "qwen3_vl", 0)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(int8(tensors), folder / "pytorch_model.bin")
    refused_everywhere(folder, "holds quantised weights.*q_proj.weight is stored as int8", tmp_path)
