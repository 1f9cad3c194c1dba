"""`torch_dist` checkpoints that megatron-core itself wrote become the Hugging Face folder they were filled from."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_rb.checkpoint.conversion.describe import describe
from megatron_rb.checkpoint.conversion.export_hf import export_checkpoint
from megatron_rb.checkpoint.conversion.from_megatron import convert_megatron
from megatron_rb.checkpoint.conversion.verify import verify
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
        "model": "qwen3_vl tied", "tower": "bridge", "layout": MANY, "numbered": True,
    },
    "Bridge, Qwen3-VL, first releases": {"model": "qwen3_vl", "tower": "vision_model", "layout": MANY},
    "Pai, Qwen3-VL": {"model": "qwen3_vl", "tower": "pai", "layout": MANY},
    "one rank, with optimizer": {"model": "qwen2_5_vl", "tower": "pai", "layout": ONE, "optimizer": True},
    "one rank, wrapped": {"model": "qwen3_vl", "tower": "bridge", "layout": ONE, "prefix": "module."},
    "one rank, fp32": {"model": "qwen3_vl", "tower": "bridge", "layout": ONE, "dtype": "fp32"},
}  # fmt: skip


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
