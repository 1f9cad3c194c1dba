"""Runs a test function in several gloo processes under a hard time limit."""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.distributed.forked import REPOSITORY, ForkedProcess, environment_of_tests, kill_group, start_forked

Process = ForkedProcess | subprocess.Popen


def run_world(
    function: str, world_size: int, timeout: float = 120.0, fresh: bool = False, **arguments: Any
) -> list[Any]:
    """Call `package.module:function(**arguments)` in `world_size` processes; returns their JSON values by rank.

    Arguments and results travel as JSON. RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set as torchrun
    does; the function sets up torch.distributed itself. When a rank fails or the time is over all are killed, and an
    AssertionError carries the end of every rank's output (with all stacks after a timeout).

    Args:
        fresh: start new interpreters, for a function that changes what torch or megatron-core see at their import. The
            ranks are forked otherwise, from a process with megatron-core adapted to the CPU.
    """
    with tempfile.TemporaryDirectory(prefix="world-") as name:
        folder = Path(name)
        (folder / "arguments.json").write_text(json.dumps(arguments))
        # The stacks are dumped a little before the parent kills, so that they reach the log.
        words = [function, name, str(max(timeout - 5.0, 1.0))]
        ranks: list[Process] = []
        try:
            for rank, environment in enumerate(_environments(world_size)):
                ranks.append(_start(words, environment, folder / f"rank{rank}.log", fresh))
            _wait(ranks, time.monotonic() + timeout)
        finally:
            for process in ranks:
                kill_group(process)
        return _results(function, ranks, folder)


def _environments(world_size: int) -> list[dict[str, str]]:
    """Of every rank, as torchrun sets it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    size = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [environment_of_tests(RANK=str(rank), LOCAL_RANK=str(rank), **size, **meeting) for rank in range(world_size)]


def _start(words: Sequence[str], environment: dict[str, str], log_file: Path, fresh: bool) -> Process:
    with open(log_file, "wb") as log, open(os.devnull, "rb") as nothing:
        if not fresh:
            streams = (nothing.fileno(), log.fileno(), log.fileno())
            return start_forked(
                "tests.distributed.world", words, REPOSITORY, environment, streams, int(environment["RANK"]) % 2
            )
        command = [sys.executable, "-m", "tests.distributed.world", *words]
        return subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=environment,
            stdin=nothing,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _wait(processes: Sequence[Process], deadline: float) -> None:
    """Return when all have ended, when the first has failed (and the others had a moment to), or at the deadline."""
    while time.monotonic() < deadline:
        codes = [process.poll() for process in processes]
        if all(code == 0 for code in codes):
            return
        if any(code not in (None, 0) for code in codes):
            deadline = min(deadline, time.monotonic() + 3.0)
            if None not in codes:
                return
        time.sleep(0.01)


def _results(function: str, processes: Sequence[Process], folder: Path) -> list[Any]:
    if any(process.returncode for process in processes):
        logs = (
            f"--- rank {rank} ({_end_of(process)}) ---\n{_tail(folder / f'rank{rank}.log')}"
            for rank, process in enumerate(processes)
        )
        raise AssertionError(f"{function} failed\n" + "\n".join(logs))
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(len(processes))]


def _end_of(process: Process) -> str:
    lost = isinstance(process, ForkedProcess) and process.lost
    return "killed, its fork server has died" if lost else f"exit {process.returncode}"


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
