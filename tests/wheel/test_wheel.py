"""The wheel is whole: installed alone and used from another folder, it needs nothing of the repository."""

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import distributions
from pathlib import Path

import pytest

from megatron_rb.config.compose import group_choices

# By their metadata: looking for the module `pip` makes setuptools leave its own distutils out of this process.
INSTALLED = {found.name for found in distributions()}
pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(not {"pip", "setuptools"} <= INSTALLED, reason="needs pip and setuptools"),
]
REPOSITORY = Path(__file__).parents[2]
SOURCES = ("megatron_rb", "kernels", "launch", "conf", "tools", "setup.py", "pyproject.toml", "README.md", "LICENSE")
GROUPS = ("experiment", "model", "parallel", "platform", "data", "optimizer", "schedule", "checkpoint", "metrics")
COMPOSE = """
from pathlib import Path
import megatron_rb
from megatron_rb.config.compose import group_choices, load_config
assert Path(megatron_rb.__file__).is_relative_to({site!r}), megatron_rb.__file__
for group in {groups!r}:
    for name in group_choices(group):
        load_config([f"{{group}}={{name}}"])
        print(f"{{group}}={{name}}")
"""


def run(words: list[str], folder: Path, site: Path | None = None) -> str:
    environment = {**os.environ, "PYTHONPATH": str(site or ""), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, since setuptools leaves its work beside the sources; without a network."""
    copy = tmp_path_factory.mktemp("copy")
    for name in SOURCES:
        path = REPOSITORY / name
        if path.is_dir():
            shutil.copytree(path, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, copy)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run([*pip, "wheel", ".", "--no-deps", "--no-build-isolation", "--no-index", "-w", "out"], copy)
    return next((copy / "out").glob("megatron_rb-*.whl"))


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory) -> Path:
    """A folder outside the repository with the installed wheel."""
    folder = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run([*pip, "install", str(wheel), "--no-deps", "--no-index", "--target", str(folder)], folder)
    return folder


@pytest.fixture
def elsewhere(tmp_path) -> Path:
    """A working folder with a small model and an empty file of rows."""
    (tmp_path / "my.jsonl").touch()
    return tmp_path


def rb(*words: str, folder: Path, site: Path) -> str:
    """The command that the wheel has installed."""
    return run([sys.executable, str(site / "bin/rb"), *words], folder, site)


def test_it_holds_every_file_that_is_read_at_run_time(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    kinds = (".py", ".yaml", ".j2")
    wanted = {
        f"megatron_rb/{path.relative_to(REPOSITORY)}"
        for room in ("kernels", "launch", "conf", "tools")
        for path in (REPOSITORY / room).rglob("*")
        if path.suffix in kinds
    }
    own = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "megatron_rb").rglob("*.py")}
    assert sorted((wanted | own) - held) == []


def test_it_holds_nothing_else(wheel):
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"megatron_rb"}


def test_its_command_lists_all_commands(site, elsewhere):
    said = rb("--help", folder=elsewhere, site=site)
    assert {"launch", "train", "convert", "plan"} <= {line.split()[0] for line in said.splitlines() if line[:2] == "  "}


def test_it_composes_every_recipe_and_choice(site, elsewhere):
    code = COMPOSE.format(site=str(site), groups=GROUPS)
    composed = run([sys.executable, "-c", code], elsewhere, site).split()
    assert composed == [f"{group}={name}" for group in GROUPS for name in group_choices(group)]


def test_it_renders_a_slurm_job(site, elsewhere):
    rb("demo-model", "--texts", str(_texts(elsewhere)), "--out", "hf", folder=elsewhere, site=site)
    settings = ["model.hf_path=hf", "data.train=[my.jsonl]", "run_dir=run", "cluster=slurm", "action=dryrun"]
    rb("launch", *settings, folder=elsewhere, site=site)
    assert (elsewhere / "run/launch/job.sbatch").read_text().startswith("#!")


def _texts(folder: Path) -> Path:
    path = folder / "texts.jsonl"
    path.write_text('{"conversations": [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": "Here."}]}\n')
    return path
