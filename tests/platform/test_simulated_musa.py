"""Runs the conformance and the trap tests in a process that has a musa device."""

import os
import re
import subprocess
import sys

import pytest

from tests.distributed.world import REPOSITORY


def run_simulated(file: str, device: str, path: str = "") -> int:
    """Run a file of tests in a process that has a device; returns the number of tests that passed, all of them.

    Args:
        path: put before PYTHONPATH.
    """
    command = [sys.executable, "-m", "pytest", f"tests/platform/{file}", "-p", "no:cacheprovider"]
    paths = os.pathsep.join(filter(None, [path, os.environ.get("PYTHONPATH", "")]))
    changes = {"SIMULATED_DEVICE": device, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": paths}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=os.environ | changes, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = re.search(r"^[.sxF]+", done.stdout, re.MULTILINE)
    assert results and set(results[0]) == {"."}, done.stdout
    return len(results[0])


@pytest.mark.parametrize(("file", "least"), [("test_conformance.py", 17), ("musa_traps.py", 24)])
def test_on_the_simulated_device(file, least):
    assert run_simulated(file, "musa") >= least
