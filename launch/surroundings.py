"""What of this machine can be known to be wrong before a run starts: its folders and its Python."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from megatron_rb.config.derive import Derived
from megatron_rb.config.on_cpu import check_on_cpu
from megatron_rb.config.schema import Config
from megatron_rb.launch.prepare import run_environment

PYTHON_SECONDS = 60
"""For a Python to say that it has this package."""


def check_surroundings(config: Config, derived: Derived) -> None:
    """Check the folders that a run writes and, where it runs on this machine, the Python it starts.

    Raises:
        ValueError: names the setting, the value and what is wrong.
    """
    environment = {**os.environ, **run_environment(config)}
    check_on_cpu(config, environment)
    for setting, folder in _written_folders(config, derived).items():
        check_folder(setting, folder)
    if config.cluster.name == "local" and config.cluster.python:
        check_python(config.cluster.python, environment)


def _written_folders(config: Config, derived: Derived) -> dict[str, Path]:
    profile, capture = config.metrics.profile, config.metrics.capture
    folders = {"run_dir": derived.run_dir, "checkpoint.dir": derived.checkpoint_dir}
    if profile.dir and (profile.steps or profile.memory):
        folders["metrics.profile.dir"] = Path(profile.dir)
    if capture.dir and capture.every:
        folders["metrics.capture.dir"] = Path(capture.dir)
    return folders


def check_folder(setting: str, folder: Path) -> None:
    """Raise ValueError unless files can be written into a folder, or one can be made there; nothing stays behind."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        raise ValueError(f"{setting} {folder}: {there} is not a folder; name another one")
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ValueError(f"{setting} {folder}: nothing can be written in {there} ({error.strerror})") from error


def check_python(python: str, environment: dict[str, str]) -> None:
    """Raise ValueError unless this is a Python that has this package."""
    if shutil.which(python) is None:
        raise ValueError(f"cluster.python {python} is not a program that can be started; name a Python")
    try:
        done = subprocess.run(
            [python, "-c", "import megatron_rb; print(megatron_rb.__name__)"],
            capture_output=True,
            text=True,
            env=environment,
            timeout=PYTHON_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ValueError(f"cluster.python {python} does not start: {error}") from error
    if done.stdout.strip() != "megatron_rb":
        last = next(iter(done.stderr.strip().splitlines()[-1:]), "it says nothing")
        raise ValueError(f"cluster.python {python} is no Python with megatron_rb: {last}")
