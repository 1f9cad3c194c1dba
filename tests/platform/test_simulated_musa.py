"""Runs the conformance and the trap tests in a process that has a musa device."""

import os
import re
import subprocess
import sys

import pytest

from tests.distributed.world import REPOSITORY


@pytest.mark.parametrize(("file", "least"), [("test_conformance.py", 17), ("musa_traps.py", 22)])
def test_on_the_simulated_device(file, least):
    command = [sys.executable, "-m", "pytest", f"tests/platform/{file}", "-p", "no:cacheprovider"]
    environment = os.environ | {"SIMULATED_MUSA": "1", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    dots = re.search(r"^[.sF]+", done.stdout, re.MULTILINE)
    assert dots and dots[0].count(".") >= least, done.stdout
