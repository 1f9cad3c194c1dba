"""A run that goes on under another release of a package and comes back, beside the unbroken one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.world import run_world
from tests.platform.test_same_recipe import LAYOUTS, name_of, short_demo

STEPS, LEG = 6, 2


def path_with(folder: str) -> str:
    """PYTHONPATH that puts the packages of a folder before the installed ones."""
    return os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH", "")]))


def said_under(path: str, program: str) -> str:
    """What a new interpreter prints with this PYTHONPATH."""
    environment = os.environ | {"PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    ).stdout.strip()


def there_and_back(other: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[float], list[float]]:
    """Losses of the unbroken run of six steps, and of steps 3 and 4 under the release in `other`, 5 and 6 back here."""
    here, there = os.environ.get("PYTHONPATH", ""), path_with(other)
    common = [*short_demo(folder), *LAYOUTS["tp1_pp1"], f"schedule.train_steps={STEPS}"]

    def run(path: str, name: str, stop: int = 0, *settings: str) -> list[float]:
        monkeypatch.setenv("PYTHONPATH", path)
        case = {"settings": [*common, *settings, f"run_dir={folder / name}"], "stop": stop}
        # Another release needs an interpreter of its own.
        world = run_world("tests.platform.cases_training:demo_runs", 1, timeout=200, fresh=True, cases=[case])
        return world[0][0]["losses"]

    whole = run(here, "whole", 0, f"checkpoint.save_every={LEG}", "checkpoint.keep_last=9")
    _carry(folder / "whole", folder / "other", LEG)
    second = run(there, "other", 2 * LEG)
    _carry(folder / "other", folder / "back", 2 * LEG)
    third = run(here, "back")
    assert len(whole) == STEPS and whole[0] != whole[-1]
    return whole, [*whole[:LEG], *second, *third]


def _carry(source: Path, target: Path, step: int) -> None:
    for name in (name_of(step), "hf"):
        shutil.copytree(source / "checkpoints" / name, target / "checkpoints" / name)
