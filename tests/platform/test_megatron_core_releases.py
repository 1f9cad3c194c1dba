"""Parts of the tests, and a run that changes over and back, under another release of megatron-core.

git -C Megatron-LM archive core_v0.19.0 megatron/core | tar -x -C FOLDER
OTHER_MEGATRON_CORE=FOLDER pytest tests/platform/test_megatron_core_releases.py

All tests under it: PYTHONPATH=FOLDER make test
"""

import os
import subprocess
import sys

import pytest

from megatron_rb.platform.mcore_version import found_version, is_supported
from tests.distributed.forked import REPOSITORY
from tests.platform.releases import path_with, said_under, there_and_back

OTHER = os.environ.get("OTHER_MEGATRON_CORE", "")
PARTS = {
    "adaptation": ["tests/unit/platform/test_mcore_shims.py", "tests/unit/platform/test_group_step_adamw.py"],
    "training steps": ["tests/parity/test_training_steps.py::test_losses_equal_transformers"],
    "layouts": ["tests/parity/test_layouts.py::test_every_layout_equals_transformers[qwen2_5_vl]"],
    "checkpoints": ["tests/distributed/test_checkpoint.py", "tests/unit/checkpoint/test_sharded.py"],
    "import and export": ["tests/distributed/test_migrate.py", "tests/distributed/test_first_weights.py"],
    "foreign checkpoints": ["tests/distributed/test_torch_dist.py"],
    "rehearsals": [
        "tests/rehearsal/test_layouts.py::test_every_layout_runs_and_every_message_has_its_other_side[qwen2_5_vl]",
        "tests/rehearsal/test_groups_at_scale.py",
    ],
}
RECIPE = ["experiment=robobrain20_7b_stage1", "--micro-batches", "2", "--ranks", "0,2", "--no-compile"]
pytestmark = [
    pytest.mark.skipif(not OTHER, reason="OTHER_MEGATRON_CORE names no folder with another megatron/core"),
    pytest.mark.timeout(1800),  # the tests inside have limits of their own
]


def under_other(*words: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": path_with(OTHER), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", *words], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )


def test_the_folder_holds_another_supported_release():
    program = "from megatron_rb.platform.mcore_version import found_version; print(found_version())"
    version = said_under(path_with(OTHER), program)
    assert version != found_version() and is_supported(version)


@pytest.mark.parametrize("part", PARTS)
def test_the_tests_of_a_part_pass_under_another_release(part):
    run = under_other("pytest", "-q", "-rs", *PARTS[part])
    assert run.returncode == 0 and " skipped" not in run.stdout, run.stdout[-5000:] + run.stderr[-1000:]


def test_a_recipe_is_rehearsed_under_another_release():
    run = under_other("megatron_rb.cli", "rehearse", *RECIPE)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-2000:]


def test_a_run_changes_the_release_of_megatron_core_and_comes_back(tmp_path, monkeypatch):
    unbroken, changing = there_and_back(OTHER, tmp_path, monkeypatch)
    assert changing == unbroken
