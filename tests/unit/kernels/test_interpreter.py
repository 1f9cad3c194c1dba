"""Runs the tests of the Triton kernels in a process of their own: the interpreter is chosen when triton is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rb.kernels.triton_runtime import interpreting
from megatron_rb.platform.base import module_exists

REPOSITORY = Path(__file__).parents[3]


@pytest.mark.skipif(not module_exists("triton"), reason="triton is not installed")
@pytest.mark.skipif(interpreting(), reason="this process is the interpreter's own")
def test_kernels_in_the_interpreter():
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", "pytest", "tests/interpreter", "-p", "no:cacheprovider"]
    if not module_exists("liger_kernel"):
        command.append("--ignore=tests/interpreter/test_liger.py")
    result = subprocess.run(
        command,
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " skipped" not in result.stdout, result.stdout[-2000:]
