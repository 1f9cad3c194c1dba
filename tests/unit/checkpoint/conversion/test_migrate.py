"""What belongs to a device or to a layer implementation stays behind; what belongs to the run comes along."""

import io
import json
import pickle
import shutil

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from megatron_rb.checkpoint.conversion.import_hf import import_folder
from megatron_rb.checkpoint.conversion.migrate import migrate_checkpoint, portable_group
from megatron_rb.checkpoint.conversion.verify import verify
from megatron_rb.checkpoint.storage.tensors import DamagedFile
from megatron_rb.checkpoint.storage.torch_dist import read_dist_folder
from tests.parity.tiny_models import write_model

CANONICAL = {
    "lr": 1e-4,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0.1,
    "wd_mult": 1.0,
    "lr_mult": 0.1,
    "step": 12,
    "is_expert_parallel": False,
    "is_decoupled_lr": False,
}
FUSED_ADAM = {"bias_correction": True, "master_weights": None}
TORCH_ADAMW = {
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "decoupled_weight_decay": True,
    "step": 12.0,
}


@pytest.mark.parametrize("switches", [{}, FUSED_ADAM, TORCH_ADAMW], ids=["ours", "fused", "torch"])
def test_groups_of_every_optimizer_become_the_same(switches):
    group = CANONICAL | switches
    for platform in ("cpu", "musa"):
        assert portable_group(group, platform) == CANONICAL
    assert portable_group(group, "cuda") == CANONICAL | {"bias_correction": True}
    assert isinstance(portable_group(group, "cpu")["step"], int)


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    root = tmp_path_factory.mktemp("imported")
    import_folder(write_model(root / "hf", "qwen3_vl", 0), root / "ckpt")
    return root / "ckpt"


def with_object(checkpoint, folder, name, value):
    """A copy of a checkpoint with one object more, written as torch.distributed.checkpoint does."""
    shutil.copytree(checkpoint, folder)
    (folder / "manifest.json").unlink()
    buffer = io.BytesIO()
    torch.save(value, buffer)
    (folder / "__1_0.distcp").write_bytes(buffer.getvalue())
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.state_dict_metadata[name] = BytesStorageMetadata()
    metadata.storage_data[MetadataIndex(name)] = _StorageInfo("__1_0.distcp", 0, len(buffer.getvalue()))
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return folder


def with_common_inside(checkpoint, folder):
    """A copy of a checkpoint that keeps the content of `common.pt` as megatron-core does from 0.19 on."""
    common = torch.load(checkpoint / "common.pt")
    with_object(checkpoint, folder, "common_state/shard_0_1", [common])
    (folder / "common.pt").unlink()
    return common


def test_what_all_ranks_share_is_read_from_inside_of_the_checkpoint_too(imported, tmp_path):
    common = with_common_inside(imported, tmp_path / "source")
    migrate_checkpoint(tmp_path / "source", tmp_path / "out", "cpu")
    assert read_dist_folder(tmp_path / "source").read_common() == common
    assert torch.load(tmp_path / "out" / "common.pt") == common
    assert read_dist_folder(tmp_path / "out").objects == {}


def test_a_checkpoint_without_what_all_ranks_share_is_damaged(imported, tmp_path):
    shutil.copytree(imported, tmp_path / "source")
    (tmp_path / "source" / "common.pt").unlink()
    with pytest.raises(DamagedFile, match="has neither common.pt nor common_state in .metadata"):
        migrate_checkpoint(tmp_path / "source", tmp_path / "out", "cpu")


def test_state_of_layers_is_left_out_and_said(imported, tmp_path):
    name = "language.layers.0.mlp.linear_fc1._extra_state/shard_0_1"
    source = with_object(imported, tmp_path / "source", name, io.BytesIO(b"scales"))
    migrate_checkpoint(source, tmp_path / "out", "cuda")
    assert read_dist_folder(tmp_path / "out").objects == {}
    dropped = json.loads((tmp_path / "out" / "manifest.json").read_text())["dropped"]
    assert list(dropped) == [name] and "each makes its own" in dropped[name]
    assert verify(source, tmp_path / "out").equal


def test_object_nobody_knows_is_refused(imported, tmp_path):
    source = with_object(imported, tmp_path / "source", "secret/shard_0_1", {"a": 1})
    with pytest.raises(ValueError, match="holds the object secret/shard_0_1, whose meaning is not known"):
        migrate_checkpoint(source, tmp_path / "out", "cuda")


def test_random_states_wait_for_their_device(imported, tmp_path):
    source = with_object(
        imported, tmp_path / "source", "rng/shard_0_1", {"device": torch.arange(16, dtype=torch.uint8)}
    )
    manifest = json.loads((source / "checkpoint.json").read_text())
    (source / "checkpoint.json").write_text(json.dumps(manifest | {"layout": {"tp_size": 1, "device_type": "cuda"}}))
    state = (source / "__1_0.distcp").read_bytes()
    migrate_checkpoint(source, tmp_path / "musa", "musa")
    moved = json.loads((tmp_path / "musa" / "checkpoint.json").read_text())
    assert moved["layout"]["device_type"] == "musa" and moved["reseed"] is True
    assert read_dist_folder(tmp_path / "musa").objects == {}
    migrate_checkpoint(tmp_path / "musa", tmp_path / "cuda", "cuda")
    back = json.loads((tmp_path / "cuda" / "checkpoint.json").read_text())
    assert back["layout"] == {"tp_size": 1, "device_type": "cuda"} and "reseed" not in back
    blob = read_dist_folder(tmp_path / "cuda").objects["rng/shard_0_1"]
    assert (tmp_path / "cuda" / blob.file).read_bytes()[blob.position :][: blob.length] == state


def test_optimizer_that_is_tied_to_its_ranks_is_refused(imported, tmp_path):
    source = shutil.copytree(imported, tmp_path / "source")
    torch.save({"optimizer": {"param_state_sharding_type": "dp_reshardable"}}, source / "common.pt")
    with pytest.raises(ValueError, match="sharding type dp_reshardable, which is tied to its data-parallel size"):
        migrate_checkpoint(source, tmp_path / "out", "cuda")


def test_strange_scalar_is_refused(imported, tmp_path):
    source = shutil.copytree(imported, tmp_path / "source")
    torch.save({"parts": {"x": {1, 2}}}, source / "common.pt")
    with pytest.raises(ValueError, match="an object of set, which this stack does not write"):
        migrate_checkpoint(source, tmp_path / "out", "cuda")


def test_unknown_platform(imported, tmp_path):
    with pytest.raises(ValueError, match="--to 'tpu' is not known; use cpu, cuda, musa"):
        migrate_checkpoint(imported, tmp_path / "out", "tpu")
