"""A folder in which the commands of the documentation find what they name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_rb import cli
from megatron_rb.shapes.published import CONFIGS
from tests.docs.shown_commands import REPOSITORY

FIRST = Path("runs/first")
"""The run of getting-started.md."""
INSTRUCT = {"RoboBrain2.0-3B": "Qwen2.5-VL-3B-Instruct", "RoboBrain2.0-32B": "Qwen2.5-VL-32B-Instruct"}


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """The folder as the working folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        yield


def rb(*words: str) -> None:
    """A command in this process; it has to end well."""
    assert cli.main(words) == 0, f"rb {' '.join(words)}"


def furnish(folder: Path) -> None:
    """What is there before the commands of getting-started.md: the examples and published models without weights."""
    (folder / "examples").symlink_to(REPOSITORY / "examples")
    with inside(folder):
        rb("demo-data", "--tasks", "pointing", "--windows", "0", "--out", "made")
        for family in ("qwen3_vl", "qwen2_5_vl"):
            rb("demo-model", "--texts", "made/train.jsonl", "--family", family, "--out", f"tiny/{family}")
        _published_models()
        _the_demo()
        Path("media").symlink_to("made/media")
        for name in ("my.jsonl", "data/robobrain20/stage1.jsonl", "data/robobrain20/stage2.jsonl"):
            _rows(Path(name), 20)


def _published_models() -> None:
    for name, config in CONFIGS.items():
        places = [f"models/{name}", f"models/{INSTRUCT[name]}"] if name in INSTRUCT else [f"models/{name}"]
        for place in (*places, *(["runs/robobrain20_7b_stage1/hf"] if name == "RoboBrain2.0-7B" else [])):
            shutil.copytree(f"tiny/{config['model_type']}", place)
            Path(place, "model.safetensors").unlink()
            tokens = {key: value for key, value in _config(place).items() if key.endswith("_token_id")}
            Path(place, "config.json").write_text(json.dumps(config | tokens))


def _config(folder: str) -> dict:
    return json.loads(Path(folder, "config.json").read_text())


def _the_demo() -> None:
    """What `rb demo` makes before it trains."""
    shutil.copytree("tiny/qwen3_vl", "runs/demo/hf")
    shutil.copytree("made", "runs/demo/data")
    rb("convert", "import", "--hf", "runs/demo/hf", "--out", "runs/demo/imported")


def _rows(path: Path, count: int) -> None:
    lines = Path("made/train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines[:count]), encoding="utf-8")


def after_the_first_run() -> None:
    """Other names under which the pages speak of a trained run and its answers."""
    for name in ("my_run", "nvidia", "mtt"):
        shutil.copytree(FIRST, f"runs/{name}", symlinks=True)
    shutil.copytree("runs/demo/imported", "imported")
    shutil.copytree(FIRST / "eval", "my_benchmark")
    Path("my_benchmark/media").symlink_to(Path("made/media").absolute())
    shutil.copy(FIRST / "eval/predictions.json", "answers.json")
    shutil.copy("my.jsonl", "my_questions.jsonl")
    shutil.copy(FIRST / "stats.json", "stats.json")
    for path in (REPOSITORY / "examples/robosim/heldout").iterdir():
        Path("episodes.jsonl" if path.name == "lift.jsonl" else path.name).symlink_to(path)
