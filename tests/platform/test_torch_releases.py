"""A run goes on under another release of torch and comes back: clusters of two vendors seldom have the same one.

pip install --target FOLDER torch==2.7.1
OTHER_TORCH=FOLDER pytest tests/platform/test_torch_releases.py
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed.world import run_world
from tests.platform.test_same_recipe import LAYOUTS, name_of, short_demo

OTHER = os.environ.get("OTHER_TORCH", "")
STEPS, LEG = 6, 2


@pytest.mark.skipif(not OTHER, reason="OTHER_TORCH names no folder with another torch")
def test_a_run_changes_the_release_of_torch_and_comes_back(tmp_path, monkeypatch):
    here, there = os.environ.get("PYTHONPATH", ""), os.pathsep.join([OTHER, os.environ.get("PYTHONPATH", "")])
    common = [*short_demo(tmp_path), *LAYOUTS["tp1_pp1"], f"schedule.train_steps={STEPS}"]

    def run(path: str, name: str, stop: int = 0, *settings: str) -> list[float]:
        monkeypatch.setenv("PYTHONPATH", path)
        case = {"settings": [*common, *settings, f"run_dir={tmp_path / name}"], "stop": stop}
        # Another release of torch needs an interpreter of its own.
        world = run_world("tests.platform.cases_training:demo_runs", 1, timeout=200, fresh=True, cases=[case])
        return world[0][0]["losses"]

    monkeypatch.setenv("PYTHONPATH", there)
    version = subprocess.run([sys.executable, "-c", "import torch; print(torch.__version__)"], capture_output=True)
    assert version.stdout.decode().strip() not in ("", torch.__version__)
    whole = run(here, "whole", 0, f"checkpoint.save_every={LEG}", "checkpoint.keep_last=9")
    carry(tmp_path / "whole", tmp_path / "other", LEG)
    second = run(there, "other", 2 * LEG)
    carry(tmp_path / "other", tmp_path / "back", 2 * LEG)
    third = run(here, "back")
    assert len(whole) == STEPS and whole[0] != whole[-1]
    assert second + third == pytest.approx(whole[LEG:], rel=1e-6)


def carry(source: Path, target: Path, step: int) -> None:
    for name in (name_of(step), "hf"):
        shutil.copytree(source / "checkpoints" / name, target / "checkpoints" / name)
