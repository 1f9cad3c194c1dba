"""A platform of one's own (examples/npu_platform) needs nothing but its own package; the device is simulated."""

import subprocess
import sys
from pathlib import Path

import pytest
from setuptools import find_namespace_packages
from setuptools.config.pyprojecttoml import load_file

from megatron_rb.metrics.jsonl import read_metrics
from megatron_rb.platform.registry import ENTRY_POINT_GROUP
from tests.architecture.source_tree import sources
from tests.distributed.world import REPOSITORY
from tests.platform.packages import install_package
from tests.platform.test_commands import rb
from tests.platform.test_same_recipe import short_demo
from tests.platform.test_simulated_musa import run_simulated

EXAMPLE = REPOSITORY / "examples/npu_platform"
NPU = "tests.platform.simulated_musa:install_npu"


def installed(folder: Path, entry_points: dict[str, str]) -> str:
    """An import path with the example's code and these entry points."""
    return f"{install_package(folder, 'npu_platform', ENTRY_POINT_GROUP, entry_points)}:{EXAMPLE}"


@pytest.fixture
def example(tmp_path, monkeypatch) -> str:
    project = load_file(EXAMPLE / "pyproject.toml")["project"]
    path = installed(tmp_path, project["entry-points"][ENTRY_POINT_GROUP])
    monkeypatch.setenv("PYTHONPATH", path, prepend=":")
    return path


def test_it_passes_the_conformance_tests(example):
    assert run_simulated("test_conformance.py", "npu", example) >= 17


def test_the_demo_recipe_trains_on_it(example, tmp_path):
    """With the commands of its README; nothing says which platform, the device is the only one."""
    (tmp_path / "data").mkdir()
    one = ["parallel.tp_size=1", "parallel.pp_size=1", "parallel.layout=''", "world_size=1", "schedule.train_steps=2"]
    words = [*short_demo(tmp_path / "data"), *one, f"run_dir={tmp_path / 'run'}"]
    said = rb(tmp_path, "launch", "experiment=demo", *words, device=NPU, path=example)
    assert "demo: npu, 1 processes" in said and "varlen_attention torch" in said
    first, second = [entry["loss"] for entry in read_metrics(tmp_path / "run/metrics.jsonl")[0]]
    assert second < first


def test_what_runs_on_it_is_shown(example, tmp_path):
    said = rb(tmp_path, "doctor", "--kernels", "platform.name=npu", device=NPU, path=example)
    assert "npu (Example), simulated npu, " in said and "cpu:gloo,npu:hccl" in said
    assert "it does not run on npu" in said


def error_of(*words: str) -> str:
    command = [sys.executable, "-m", "megatron_rb.cli", *words]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    return " ".join(done.stderr.split())


def test_it_says_where_it_cannot_run(example):
    message = "platform npu cannot be used here: torch has no npu device; install the vendor's extension"
    assert message in error_of("doctor", "--kernels", "platform.name=npu")


def test_a_built_in_name_cannot_be_claimed(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", installed(tmp_path, {"musa": "npu_platform:NpuPlatform"}), prepend=":")
    message = "plug-in npu_platform:NpuPlatform takes the built-in platform name 'musa'; rename it"
    assert message in error_of("doctor", "--kernels", "platform.name=cpu")


def test_neither_the_example_nor_the_simulated_device_is_shipped():
    packages = find_namespace_packages(str(REPOSITORY), include=["megatron_rb", "megatron_rb.*"])
    assert packages and not [name for name in packages if not name.startswith("megatron_rb") or "simulated" in name]
    used = [source.room for source in sources() if any(name.startswith("tests.platform") for name in source.imports)]
    assert used == []
