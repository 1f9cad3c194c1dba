"""Folders in another form are named as what they are, with the way to use them, by every command that meets one."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_rb.checkpoint.conversion.describe import describe
from megatron_rb.checkpoint.conversion.export_hf import export_checkpoint
from megatron_rb.checkpoint.conversion.from_megatron import convert_megatron
from megatron_rb.checkpoint.conversion.import_hf import import_folder
from megatron_rb.checkpoint.conversion.migrate import migrate_checkpoint
from megatron_rb.checkpoint.conversion.verify import verify
from megatron_rb.checkpoint.hf.reader import HFReader
from megatron_rb.layout.mesh import RankGrid
from megatron_rb.parallel.mesh import Mesh
from megatron_rb.parallel.session import Session
from megatron_rb.platform.cpu import CpuPlatform
from megatron_rb.shapes.balance import default_layout
from megatron_rb.shapes.foreign import check_init
from megatron_rb.shapes.published import CONFIGS
from megatron_rb.shapes.shape import load_shape, shape_from_dict
from megatron_rb.train.build import initialise
from tests.parity.tiny_models import write_model

ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "Qwen/Qwen3-VL-8B-Instruct", "r": 16}


def lora(folder: Path) -> Path:
    """What PEFT saves."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER))
    name = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({name: torch.ones(16, 4)}, folder / "adapter_model.safetensors")
    return folder


def lora_with_config(folder: Path) -> Path:
    """Trainers copy the config.json of the base model beside it."""
    lora(folder)
    (folder / "config.json").write_text(json.dumps(CONFIGS["RoboBrain2.5-8B"]))
    return folder


def torch_dist(folder: Path) -> Path:
    """As far as its names tell; tests/distributed has real ones."""
    (folder / "iter_0000010").mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("10")
    for name in (".metadata", "common.pt", "__0_0.distcp"):
        (folder / "iter_0000010" / name).write_bytes(b"")
    return folder


def torch_dist_iteration(folder: Path) -> Path:
    return torch_dist(folder) / "iter_0000010"


def legacy(folder: Path) -> Path:
    (folder / "iter_0000010" / "mp_rank_00").mkdir(parents=True)
    return folder


def zero(folder: Path) -> Path:
    (folder / "global_step10").mkdir(parents=True)
    (folder / "global_step10" / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"")
    return folder


LORA = "holds a LORA adapter of Qwen/Qwen3-VL-8B-Instruct and not the model's own weights; merge it"
DIST = "is a distributed Megatron checkpoint .torch_dist.; make .* rb convert from-megatron --ckpt"
KINDS = {
    lora: LORA,
    lora_with_config: LORA,
    torch_dist: DIST,
    torch_dist_iteration: DIST,
    legacy: "is a legacy Megatron checkpoint; make .* rb convert from-megatron --ckpt",
    zero: "holds DeepSpeed ZeRO shards; make whole weights",
}
SHAPE = shape_from_dict(CONFIGS["RoboBrain2.5-8B"])
SESSION = Session(CpuPlatform(), Mesh(RankGrid()), SHAPE, default_layout(SHAPE, 1), torch.device("cpu"))
READERS = {
    "import": lambda folder, out: import_folder(folder, out),
    "export": lambda folder, out: export_checkpoint(folder, out),
    "migrate": lambda folder, out: migrate_checkpoint(folder, out, "cpu"),
    "verify": lambda folder, out: verify(folder, folder),
    "model.hf_path": lambda folder, out: HFReader(folder, load_shape(folder)),
    "launch": lambda folder, out: check_init(str(folder)),
    "checkpoint.init": lambda folder, out: initialise([], SESSION, str(folder), 0),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_folder_is_named_by_every_reader(tmp_path, make, reader):
    folder = make(tmp_path / "folder")
    with pytest.raises(ValueError, match=KINDS[make]):
        READERS[reader](folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_from_megatron_names_what_is_not_of_megatron(tmp_path):
    hf = write_model(tmp_path / "hf", "qwen3_vl", 0)
    import_folder(hf, tmp_path / "ckpt")
    for folder, words in (
        (lora(tmp_path / "lora"), LORA),
        (hf, "is a Hugging Face folder; .*rb convert import --hf"),
        (tmp_path / "ckpt", "is a checkpoint of this stack already"),
    ):
        with pytest.raises(ValueError, match=words):
            convert_megatron(folder, tmp_path / "out")


def test_inspect_describes_an_adapter(tmp_path):
    description = describe(lora(tmp_path / "lora"))
    assert description["format"] == "LORA adapter, not whole weights"
    assert (description["base_model"], description["rank"]) == (ADAPTER["base_model_name_or_path"], 16)


def test_folders_of_this_stack_are_not_foreign(tmp_path):
    hf = write_model(tmp_path / "hf", "qwen3_vl", 0)
    import_folder(hf, tmp_path / "ckpt")
    for folder in (hf, tmp_path / "ckpt", tmp_path / "none"):
        check_init(str(folder))
