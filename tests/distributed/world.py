"""Runs a test function in several gloo processes under a hard time limit."""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]


def run_world(function: str, world_size: int, timeout: float = 120.0, **arguments: Any) -> list[Any]:
    """Call `package.module:function(**arguments)` in `world_size` processes; returns their JSON values by rank.

    Arguments and results travel as JSON. RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set as torchrun
    does; the function sets up torch.distributed itself. When a rank fails or the time is over all are killed, and an
    AssertionError carries the end of every rank's output (with all stacks after a timeout).
    """
    with tempfile.TemporaryDirectory(prefix="world-") as folder:
        ranks = _start(function, world_size, timeout, arguments, Path(folder))
        try:
            _wait(ranks, time.monotonic() + timeout)
        finally:
            for process in ranks:
                _kill(process)
        return _results(function, ranks, Path(folder))


def _start(function: str, world_size: int, timeout: float, arguments: dict, folder: Path) -> list[subprocess.Popen]:
    (folder / "arguments.json").write_text(json.dumps(arguments))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(world_size):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
        }
        # The stacks are dumped a little before the parent kills, so that they reach the log.
        command = [sys.executable, "-m", "tests.distributed.world", function, str(folder), str(max(timeout - 5.0, 1.0))]
        with open(folder / f"rank{rank}.log", "wb") as log:
            process = subprocess.Popen(
                command, cwd=REPOSITORY, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        processes.append(process)
    return processes


def _wait(processes: list[subprocess.Popen], deadline: float) -> None:
    """Return when all have ended, when the first has failed (and the others had a moment to), or at the deadline."""
    while time.monotonic() < deadline:
        codes = [process.poll() for process in processes]
        if all(code == 0 for code in codes):
            return
        if any(code not in (None, 0) for code in codes):
            deadline = min(deadline, time.monotonic() + 3.0)
            if None not in codes:
                return
        time.sleep(0.05)


def _kill(process: subprocess.Popen) -> None:
    """End the process with all its children: checkpoint writers outlive their parent otherwise."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _results(function: str, processes: list[subprocess.Popen], folder: Path) -> list[Any]:
    codes = [process.returncode for process in processes]
    if any(codes):
        logs = (
            f"--- rank {rank} (exit {code}) ---\n{_tail(folder / f'rank{rank}.log')}" for rank, code in enumerate(codes)
        )
        raise AssertionError(f"{function} failed\n" + "\n".join(logs))
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(len(processes))]


def _tail(path: Path, lines: int = 60) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])


def _worker(function: str, folder: Path, time_limit: float) -> None:
    faulthandler.dump_traceback_later(time_limit, exit=True)
    import torch

    torch.set_num_threads(1)
    module, name = function.split(":")
    arguments = json.loads((folder / "arguments.json").read_text())
    value = getattr(importlib.import_module(module), name)(**arguments)
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(value))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    try:
        _worker(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]))
    except BaseException:
        traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)  # a normal exit would wait for peers that still sit in a collective
