"""Rehearses the ranks of a run in a process per core and puts together what they saw."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rb.platform.guard import guard_library
from megatron_rb.rehearsal.prepare import Rehearsal
from megatron_rb.rehearsal.records import RehearsedRank
from megatron_rb.rehearsal.worker import KERNELS_FILE, REHEARSE

WORKER = "megatron_rb.app.worker"
LOG_FILE = "worker.log"
POLL_SECONDS = 0.2
LAST_LINES = 6
"""Of the log of a process that failed."""
DROPPED = ("CUDA_VISIBLE_DEVICES", "MASTER_PORT")
"""Variables that speak of devices and worlds that are there."""


@dataclass(frozen=True)
class Rehearsed:
    """What all processes together saw."""

    records: list[RehearsedRank]
    """By rank."""
    kernels: list[str]
    """Lines on Triton kernels that do not compile."""


def rehearse(
    rehearsal: Rehearsal,
    folder: Path,
    processes: int = 0,
    progress: Callable[[int, int], None] = lambda done, all: None,
) -> Rehearsed:
    """What was seen of the ranks.

    Args:
        processes: at the same time; 0 = one per core.
        progress: called with the ranks that are done, and all.

    Raises:
        ValueError: a rank could not be rehearsed; says which, and why.
    """
    count = min(processes or len(os.sched_getaffinity(0)), len(rehearsal.ranks))
    folders = [folder / f"process_{number}" for number in range(count)]
    for number, own in enumerate(folders):
        own.mkdir()
        (own / "run").symlink_to(folder / "run")
        rehearsal.job(list(rehearsal.ranks[number::count])).write(own)
    with _workers(folders) as workers:
        while any(worker.poll() is None for worker in workers):
            progress(sum(1 for _ in _files(folders)), len(rehearsal.ranks))
            _check(rehearsal, folders, workers)
            time.sleep(POLL_SECONDS)
        _check(rehearsal, folders, workers)
    records = [_read(file) for file in _files(folders)]
    progress(len(records), len(rehearsal.ranks))
    kernels = [line for own in folders if (own / KERNELS_FILE).is_file() for line in _read(own / KERNELS_FILE)]
    return Rehearsed(sorted(records, key=lambda record: record.rank), kernels)


def _read(file: Path) -> Any:
    return pickle.loads(file.read_bytes())


@contextmanager
def _workers(folders: Sequence[Path]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """A process per folder; none is left behind."""
    library = guard_library()
    workers = []
    try:
        for folder in folders:
            with (folder / LOG_FILE).open("wb") as log:
                command = [sys.executable, "-m", WORKER, REHEARSE, str(folder)]
                workers.append(subprocess.Popen(command, env=_environment(library), stdout=log, stderr=log))
        yield workers
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def _environment(library: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in DROPPED and not name.startswith("SLURM_")}
    # The library has to be there before torch looks for CUDA; nothing is compiled, for nothing runs.
    return kept | {"LD_PRELOAD": str(library), "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}


def _files(folders: Sequence[Path]) -> Iterator[Path]:
    for folder in folders:
        yield from folder.glob("rank_*.pickle")


def _check(rehearsal: Rehearsal, folders: Sequence[Path], workers: Sequence[subprocess.Popen[bytes]]) -> None:
    for number, (folder, worker) in enumerate(zip(folders, workers, strict=True)):
        if worker.poll():
            done = sum(1 for _ in folder.glob("rank_*.pickle"))
            rank = rehearsal.ranks[number :: len(workers)][done]
            lines = [line for line in (folder / LOG_FILE).read_text(errors="replace").splitlines() if _tells(line)]
            raise ValueError(f"rank {rank} cannot be rehearsed:\n" + "\n".join(lines[-LAST_LINES:]))


def _tells(line: str) -> bool:
    return bool(line.strip()) and "registered at" not in line and "(rb --debug" not in line
