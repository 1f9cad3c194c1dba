"""A run goes on under another release of torch and comes back: clusters of two vendors seldom have the same one.

pip install --target FOLDER torch==2.7.1
OTHER_TORCH=FOLDER pytest tests/platform/test_torch_releases.py
"""

import os

import pytest
import torch

from tests.platform.releases import path_with, said_under, there_and_back

OTHER = os.environ.get("OTHER_TORCH", "")


@pytest.mark.skipif(not OTHER, reason="OTHER_TORCH names no folder with another torch")
def test_a_run_changes_the_release_of_torch_and_comes_back(tmp_path, monkeypatch):
    version = said_under(path_with(OTHER), "import torch; print(torch.__version__)")
    assert version not in ("", torch.__version__)
    unbroken, changing = there_and_back(OTHER, tmp_path, monkeypatch)
    assert changing == pytest.approx(unbroken, rel=1e-6)
