"""File systems without locks are worked on with a note; a lock that another process holds is respected as before."""

import errno
import fcntl
import logging
import os

import pytest

from megatron_rb.checkpoint.conversion.import_hf import import_folder
from megatron_rb.checkpoint.conversion.verify import verify
from megatron_rb.config.locks import lock_exclusively
from megatron_rb.launch.folder import own_folder
from tests.parity.tiny_models import write_model

NOTE = "has no file locks"
ANSWERS = [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP]


@pytest.fixture(params=ANSWERS, ids=errno.errorcode.get)
def without_locks(request, monkeypatch):
    def flock(file, operation):
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", flock)


def test_conversion_goes_on_with_a_note(without_locks, tmp_path, caplog):
    hf = write_model(tmp_path / "hf", "qwen3_vl", 0)
    import_folder(hf, tmp_path / "ckpt")
    assert verify(hf, tmp_path / "ckpt").equal
    assert [NOTE in record.getMessage() for record in caplog.records if record.name.endswith("locks")] == [True]


def test_launch_goes_on_with_a_note(without_locks, tmp_path, caplog):
    with own_folder(tmp_path / "run"):
        assert (tmp_path / "run" / "launch.lock").read_text() == str(os.getpid())
    assert any(NOTE in record.getMessage() and record.levelno == logging.WARNING for record in caplog.records)


def test_held_lock_is_respected(tmp_path, caplog):
    with open(tmp_path / "lock", "w") as first, open(tmp_path / "lock", "w") as second:
        lock_exclusively(first, tmp_path)
        with pytest.raises(BlockingIOError):
            lock_exclusively(second, tmp_path)
    assert not caplog.records


def test_other_faults_are_not_passed_over(tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", flock)
    with open(tmp_path / "lock", "w") as file, pytest.raises(OSError, match="Input/output error"):
        lock_exclusively(file, tmp_path)
