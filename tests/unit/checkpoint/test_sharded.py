"""What megatron-core is told when it writes a checkpoint; its releases differ in what they can be told."""

from types import SimpleNamespace

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from megatron_rb.checkpoint import fitting, sharded
from megatron_rb.checkpoint.stored import Stored
from megatron_rb.layout.mesh import RankGrid
from megatron_rb.parallel.mesh import Mesh
from megatron_rb.platform.cpu import CpuPlatform

CHUNKS = (SimpleNamespace(mesh=Mesh(RankGrid()), sharded_state_dict=dict),)
"""Of a model without weights."""


def as_in_0_16(received):
    """`dist_checkpointing.save` of that release, which knows no other writers than its own."""

    def save(
        content,
        folder,
        sharded_strategy,
        validate_access_integrity=True,
        async_sharded_save=False,
        preprocess_common_before_consistancy_check=None,
    ):
        received.update(asynchronous=async_sharded_save)

    return save


def as_in_0_19(received):
    """`dist_checkpointing.save` of 0.17 and newer, which takes another package's writers unless told otherwise."""

    def save(
        content,
        folder,
        sharded_strategy,
        validate_access_integrity=True,
        async_sharded_save=False,
        preprocess_common_before_consistancy_check=None,
        async_strategy="nvrx",
    ):
        received.update(asynchronous=async_sharded_save, writers=async_strategy)

    return save


@pytest.fixture
def state(lone_mesh):
    optimizer = SimpleNamespace(sharded_state_dict=lambda *arguments, **options: {})
    return sharded.TrainingState(CHUNKS, optimizer, {}, {}, {}, CpuPlatform(), reseed=lambda step: None)


@pytest.mark.parametrize(
    ("release", "expected"),
    [(as_in_0_16, {"asynchronous": True}), (as_in_0_19, {"asynchronous": True, "writers": "mcore"})],
)
def test_asynchronous_saves_use_the_writers_that_the_queue_can_start(state, monkeypatch, tmp_path, release, expected):
    received: dict = {}
    monkeypatch.setattr(sharded.dist_checkpointing, "save", release(received))
    sharded.save_sharded(state, tmp_path, asynchronous=True)
    assert received == expected


@pytest.mark.parametrize(
    ("release", "expected"),
    [(as_in_0_16, {"asynchronous": False}), (as_in_0_19, {"asynchronous": False, "writers": "mcore"})],
)
def test_weights_are_saved_by_the_same_writers(monkeypatch, tmp_path, release, expected):
    received: dict = {}
    monkeypatch.setattr(sharded.dist_checkpointing, "save", release(received))
    sharded.save_model_only({}, tmp_path)
    assert received == expected


def test_every_checkpoint_has_a_common_file_whichever_release_wrote_it(monkeypatch, tmp_path):
    monkeypatch.setattr(sharded.dist_checkpointing, "load_common_state_dict", lambda folder: {"parts": folder})
    sharded.complete_common(tmp_path)
    assert torch.load(tmp_path / "common.pt") == {"parts": str(tmp_path)}


def test_a_common_file_that_megatron_core_has_written_stays_as_it_is(tmp_path):
    (tmp_path / "common.pt").write_bytes(b"its own")
    sharded.complete_common(tmp_path)
    assert (tmp_path / "common.pt").read_bytes() == b"its own"


def holding(*keys: str):
    """Stands in for the reader of a folder: a checkpoint with these keys, whatever they hold."""
    entries = {key: BytesStorageMetadata() for key in keys}
    return lambda folder: Stored(folder, Metadata(entries), {})


@pytest.mark.usefixtures("lone_mesh")
def test_a_common_state_inside_of_a_checkpoint_is_nothing_that_a_run_lacks(monkeypatch, tmp_path):
    """Releases before 0.19 know it as any other key that was not asked for."""
    monkeypatch.setattr(fitting, "open_stored", holding("common_state"))
    sharded.load_model_only(CHUNKS, tmp_path)


@pytest.mark.usefixtures("lone_mesh")
def test_another_key_that_was_not_asked_for_is(monkeypatch, tmp_path):
    monkeypatch.setattr(fitting, "open_stored", holding("more"))
    with pytest.raises(ValueError, match="has beyond it more"):
        sharded.load_model_only(CHUNKS, tmp_path)
