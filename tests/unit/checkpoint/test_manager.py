"""Folders of checkpoints: what counts as complete, and what is refused."""

import errno
import json
from types import SimpleNamespace

import pytest
from torch.distributed.checkpoint.api import CheckpointException

from megatron_rb.platform.cpu import CpuPlatform
from megatron_rb.platform.mcore_shims import install_mcore_shims

install_mcore_shims(CpuPlatform())

from megatron_rb.checkpoint import manager  # noqa: E402
from megatron_rb.checkpoint.manager import CheckpointManager  # noqa: E402
from megatron_rb.checkpoint.manifest import (  # noqa: E402
    check_same_model,
    complete_steps,
    is_checkpoint,
    read_manifest,
)


def _checkpoint(root, name, **manifest):
    folder = root / name
    folder.mkdir()
    (folder / "checkpoint.json").write_text(json.dumps({"format": 1, "step": 1} | manifest))
    return folder


def test_only_complete_folders_count(tmp_path):
    assert complete_steps(tmp_path / "absent") == set()
    for name in ("step_00000003", "step_00000120", "step_00000500.writing-0a1b2c3d", "step_00000400.deleting-0a1b2c3d"):
        _checkpoint(tmp_path, name)
    (tmp_path / "step_00000900").write_text("a file")
    assert complete_steps(tmp_path) == {3, 120}


def test_a_folder_being_written_is_no_checkpoint(tmp_path):
    assert is_checkpoint(_checkpoint(tmp_path, "step_00000003"))
    assert not is_checkpoint(_checkpoint(tmp_path, "step_00000004.writing-0a1b2c3d"))
    assert not is_checkpoint(tmp_path)


def test_a_folder_without_manifest_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a checkpoint: it has no checkpoint.json"):
        read_manifest(tmp_path)


def test_another_format_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has checkpoint format 9, this version reads format 1"):
        read_manifest(_checkpoint(tmp_path, "step_00000003", format=9))


def test_another_model_is_named_by_what_differs():
    manifest = {"model": {"hidden_size": 8, "layers": [1, 2]}}
    check_same_model(manifest, {"hidden_size": 8, "layers": (1, 2)}, "folder")
    with pytest.raises(ValueError, match="hidden_size is 8 there and 16 here; kind is None there and vlm here"):
        check_same_model(manifest, {"hidden_size": 16, "layers": (1, 2), "kind": "vlm"}, "folder")


def test_negative_retention_is_refused(tmp_path):
    with pytest.raises(ValueError, match="keep_last -1 is negative"):
        CheckpointManager(tmp_path, keep_last=-1)


@pytest.mark.parametrize(("free", "kind", "code"), [(4096, OSError, errno.ENOSPC), (1 << 30, RuntimeError, None)])
def test_failure_of_writers_is_that_of_the_disk_where_it_is_full(tmp_path, monkeypatch, free, kind, code):
    monkeypatch.setattr(manager.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    with pytest.raises(kind, match=str(tmp_path)) as caught, manager._failures_as_errors(tmp_path):
        raise CheckpointException("write", {})
    assert getattr(caught.value, "errno", None) == code
