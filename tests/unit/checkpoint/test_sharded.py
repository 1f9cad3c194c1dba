"""What megatron-core is told when it writes a checkpoint; its releases differ in what they can be told."""

from types import SimpleNamespace

import pytest

from megatron_rb.checkpoint import sharded
from megatron_rb.platform.cpu import CpuPlatform


def as_in_0_16(received):
    """`dist_checkpointing.save` of that release, which knows no other writers than its own."""

    def save(
        content, folder, sharded_strategy, async_sharded_save=False, preprocess_common_before_consistancy_check=None
    ):
        received.update(asynchronous=async_sharded_save)

    return save


def as_in_0_19(received):
    """`dist_checkpointing.save` of 0.17 and newer, which takes another package's writers unless told otherwise."""

    def save(
        content,
        folder,
        sharded_strategy,
        async_sharded_save=False,
        preprocess_common_before_consistancy_check=None,
        async_strategy="nvrx",
    ):
        received.update(asynchronous=async_sharded_save, writers=async_strategy)

    return save


@pytest.fixture
def state(lone_mesh):
    optimizer = SimpleNamespace(sharded_state_dict=lambda *arguments, **options: {})
    return sharded.TrainingState((), optimizer, {}, {}, {}, CpuPlatform(), reseed=lambda step: None)


@pytest.mark.parametrize(
    ("release", "expected"),
    [(as_in_0_16, {"asynchronous": True}), (as_in_0_19, {"asynchronous": True, "writers": "mcore"})],
)
def test_asynchronous_saves_use_the_writers_that_the_queue_can_start(state, monkeypatch, tmp_path, release, expected):
    received: dict = {}
    monkeypatch.setattr(sharded.dist_checkpointing, "save", release(received))
    sharded.save_sharded(state, tmp_path, low_memory=True, asynchronous=True)
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
