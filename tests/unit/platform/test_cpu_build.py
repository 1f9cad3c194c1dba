"""The interpreter of a rehearsal where torch is a CUDA build."""

import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from megatron_rb.platform.cpu_build import cpu_interpreter

VERSION = metadata.version("torch").partition("+")[0]


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """What would be run, in a cache of its own, with a torch that says it is built for CUDA."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    return []


def test_a_cpu_build_needs_nothing(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert cpu_interpreter(agree=pytest.fail, run=pytest.fail) == sys.executable


def test_an_environment_is_made_once_and_has_the_packages_of_this_one(asked):
    python = cpu_interpreter(lambda text: True, asked.append)
    assert [words[1:3] for words in asked] == [["-m", "venv"], ["-m", "pip"]]
    assert f"torch=={VERSION}" in asked[1] and asked[1][0] == python
    beside = next(Path(python).parents[1].glob("lib/python*/site-packages/beside.pth")).read_text().splitlines()
    assert any("site-packages" in line for line in beside)
    assert cpu_interpreter(pytest.fail, pytest.fail) == python


def test_nothing_is_made_without_consent(asked, tmp_path):
    with pytest.raises(ValueError, match=r"this one is built for CUDA 12.9; agree to make .* with --make-environment"):
        cpu_interpreter(lambda text: False, asked.append)
    assert not asked and not any(tmp_path.iterdir())


def test_an_environment_that_was_not_finished_is_made_anew(asked):
    def fail(words):
        raise ValueError("no network")

    with pytest.raises(ValueError, match="no network"):
        cpu_interpreter(lambda text: True, fail)
    cpu_interpreter(lambda text: True, asked.append)
    assert len(asked) == 2
