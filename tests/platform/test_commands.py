"""`rb`, unmodified, on cpu and on a musa device that torch loads as it loads the vendor's, compared by files alone.

The device is simulated (tests/platform/simulated_musa says what that leaves open).
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_rb.cli import main
from megatron_rb.platform.registry import ENTRY_POINT_GROUP
from tests.distributed.world import REPOSITORY
from tests.platform.packages import TORCH_BACKENDS, install_package
from tests.platform.test_same_recipe import short_demo

STEPS = 32
"""Of each run; the half that counts as its end is long enough for a verdict."""
SOUND, FAULTY = "tests.platform.simulated_musa:install", "tests.platform.simulated_musa.faulty:install"


def rb(folder: Path, *words: str, device: str = "", path: str = "", code: int = 0) -> str:
    """Run a command in a process of its own; returns what it prints.

    Args:
        device: function that gives the process, and those it starts, a device; empty = there is none.
        path: put before PYTHONPATH.
        code: the exit code that must come.
    """
    paths = [path, str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    if device:
        site = folder / f"site_{device.replace(':', '_')}"
        paths.insert(0, str(site) if site.is_dir() else install_package(site, "dev", TORCH_BACKENDS, {"dev": device}))
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    done = subprocess.run(
        [sys.executable, "-m", "megatron_rb.cli", *words],
        cwd=folder,
        env=environment,
        text=True,
        timeout=200,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == code, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def brought(tmp_path_factory) -> Path:
    """A run on each platform and a capture on the faulty device, copied to where the others have never been."""
    there, here = tmp_path_factory.mktemp("clusters"), tmp_path_factory.mktemp("desk")
    (there / "inputs").mkdir()
    settings = [
        "experiment=demo",
        *(word for word in short_demo(there / "inputs") if not word.startswith("platform.")),
        "parallel.tp_size=1",
        "parallel.pp_size=1",
        "parallel.layout=''",
        "world_size=1",
        f"schedule.train_steps={STEPS}",
        "metrics.capture.every=100",
    ]
    for platform, device in (("cpu", ""), ("musa", SOUND)):
        words = [*settings, f"platform={platform}", f"run_dir={there / platform}"]
        said = rb(there, "launch", *words, device=device)
        assert f"demo: {platform}, 1 processes" in said and "kernels: layers local, adam torch, mrope torch" in said
    rb(there, "compare", "capture", *settings, "platform=musa", "--out", str(there / "faulty"), device=FAULTY)
    for name in ("cpu", "musa", "faulty"):
        shutil.move(there / name, here / name)
    shutil.rmtree(there)
    return here


def compared(capsys, *words: object) -> tuple[int, dict]:
    """Exit code and result of `rb compare` in this process."""
    assert not hasattr(torch, "musa") and "torch_musa" not in sys.modules
    code = main(["compare", *map(str, words), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_captures_of_two_platforms_have_drifted_and_no_operator_is_at_fault(brought, capsys):
    code, result = compared(capsys, "numerics", brought / "cpu", brought / "musa")
    assert code == 0 and result["defects"] == [] and result["verdict"].startswith("drift: ")
    assert "musa, simulated musa" in result["sides"][1] and "cpu, " in result["sides"][0]
    points = [point for point in result["points"] if point["point"] == "output"]
    assert len(points) == 10 and all(0 <= point["relative"] < 1e-5 for point in points)
    assert max(operator["excess"] for operator in result["operators"]) < 0.5


def test_wrong_kernel_of_the_device_is_found_in_the_blocks_that_call_it(brought, capsys):
    code, result = compared(capsys, "numerics", brought / "cpu", brought / "faulty")
    found = [(item["block"], item["operator"], item["side"]) for item in result["defects"] if not item["backward"]]
    assert code == 1 and found == [(f"language.layers.{layer}", "fc2", "B") for layer in range(3)]
    assert result["verdict"].startswith("defect in language.layers.0: fc2 on side B")


def test_runs_of_two_platforms_agree(brought, capsys):
    code, result = compared(capsys, "runs", brought / "cpu", brought / "musa")
    assert (code, result["verdict"], result["window_steps"]) == (0, "agree", STEPS // 2)
    assert abs(result["final_gap"]["percent"]) + result["final_gap"]["margin"] < 0.01
    assert any("counts of samples, tokens, labels and patches are equal" in line for line in result["agreement"])


def test_table_of_kernels_is_that_of_the_device(tmp_path):
    lines = rb(tmp_path, "doctor", "--kernels", "platform=musa", device=SOUND).splitlines()
    assert lines[0].startswith("musa (Moore Threads), simulated musa, ") and "cpu:gloo,musa:mccl" in lines[0]
    rows = [line.split(maxsplit=2) for line in lines[1:] if not line.startswith("->")]
    assert ["mrope", "triton", "on musa it has to be asked for"] in rows
    assert ["varlen_attention", "flash_attn", "it does not run on musa"] in rows


def test_two_accelerators_of_which_none_is_chosen_are_a_sentence_that_names_both(tmp_path):
    plugin = install_package(
        tmp_path / "npu", "npu", ENTRY_POINT_GROUP, {"npu": "tests.platform.packages:PresentPlatform"}
    )
    said = " ".join(rb(tmp_path, "doctor", "--kernels", device=SOUND, path=plugin, code=2).split())
    assert "several accelerators are present: musa (2 musa device(s)), npu (always present); choose one with" in said
    assert "platform.name=<name> or MEGATRON_RB_PLATFORM" in said and "Traceback" not in said
