"""Rehearses the ranks of a run in a process per core and puts together what they saw."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megatron_rb.config.child_processes import check_stopped, follow_parent, held_back
from megatron_rb.platform.guard import guard_library, preloading
from megatron_rb.rehearsal.job import JOB_FILE, RUN_FOLDER, RehearsalJob
from megatron_rb.rehearsal.prepare import Rehearsal
from megatron_rb.rehearsal.records import RehearsedRank
from megatron_rb.rehearsal.worker import KERNELS_FILE, REHEARSE

WORKER = "megatron_rb.app.worker"
LOG_FILE = "worker.log"
POLL_SECONDS = 0.2
LAST_LINES = 6
"""Of the log of a process that failed."""
TOLD = "rb: "
"""Before the sentence of a process that ended with wrong input."""
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
    rehearsals: Sequence[Rehearsal],
    folder: Path,
    processes: int = 0,
    progress: Callable[[int, int], None] = lambda done, all: None,
    worker: str = REHEARSE,
    python: str = sys.executable,
) -> list[Rehearsed]:
    """What was seen of the ranks of every run.

    Args:
        folder: empty; the processes work in it.
        processes: at the same time; 0 = one per core.
        progress: called with the ranks that are done, and all.
        worker: the `module:function` that the processes run.
        python: interpreter of the processes; its torch is a CPU build.

    Raises:
        ValueError: a rank could not be rehearsed; says which, and why.
    """
    wanted = sum(len(rehearsal.ranks) for rehearsal in rehearsals)
    folders = _share_out(rehearsals, folder, processes or len(os.sched_getaffinity(0)))
    with _workers(folders, worker, python) as workers:
        while any(worker.poll() is None for worker in workers):
            progress(sum(1 for _ in folder.glob("*/*/rank_*.pickle")), wanted)
            _check(folders, workers)
            check_stopped()
            time.sleep(POLL_SECONDS)
        _check(folders, workers)
    progress(wanted, wanted)
    return [_collected(folder, _job_name(number)) for number in range(len(rehearsals))]


def _share_out(rehearsals: Sequence[Rehearsal], folder: Path, count: int) -> list[Path]:
    """A folder per process with its part of the ranks of every run.

    What is installed is the same for all runs of a process: what it has imported once stays.
    """
    kinds: dict[str, int] = {}
    for rehearsal in rehearsals:
        kinds.setdefault(_kind(rehearsal), len(kinds))
    count = max(1, count // len(kinds))
    for number, rehearsal in enumerate(rehearsals):
        kind = kinds[_kind(rehearsal)]
        for place in range(count):
            process = folder / f"process_{kind}_{place}"
            ranks = rehearsal.ranks[(place + number) % count :: count]
            if not ranks:
                continue
            job = process / _job_name(number)
            job.mkdir(parents=True)
            (job / RUN_FOLDER).symlink_to((rehearsal.folder / RUN_FOLDER).absolute())
            rehearsal.job(list(ranks)).write(job)
    return sorted(process for process in folder.glob("process_*") if process.is_dir())


def _kind(rehearsal: Rehearsal) -> str:
    return f"{rehearsal.device.platform} {sorted(rehearsal.packages.items())}"


def _job_name(number: int) -> str:
    return f"job_{number:04d}"


def _collected(folder: Path, job: str) -> Rehearsed:
    records = [_read(file) for file in folder.glob(f"*/{job}/rank_*.pickle")]
    kernels = [line for file in sorted(folder.glob(f"*/{job}/{KERNELS_FILE}")) for line in _read(file)]
    return Rehearsed(sorted(records, key=lambda record: record.rank), kernels)


def _read(file: Path) -> Any:
    return pickle.loads(file.read_bytes())


@contextmanager
def _workers(folders: Sequence[Path], target: str, python: str) -> Iterator[list[subprocess.Popen[bytes]]]:
    """A process per folder; none is left behind."""
    devices = [_device_type(folder) for folder in folders]
    libraries = {device: _library(python, device) for device in devices}
    workers = []
    try:
        with held_back():
            for folder, device in zip(folders, devices, strict=True):
                with (folder / LOG_FILE).open("wb") as log:
                    words = ["-m", WORKER, target, str(folder)]
                    workers.append(start_worker([python, *words], _environment(libraries[device]), log))
        yield workers
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def start_worker(command: Sequence[str], environment: Mapping[str, str], log: BinaryIO) -> subprocess.Popen[bytes]:
    """A process that rehearses the jobs of the folder that its command ends with."""
    return subprocess.Popen(command, env=environment, stdout=log, stderr=log, preexec_fn=follow_parent())


def _device_type(folder: Path) -> str:
    """That of the runs of a process."""
    return RehearsalJob.read(next(folder.glob(f"*/{JOB_FILE}")).parent).device_type


def _library(python: str, device_type: str) -> Path:
    """The library for the torch of an interpreter."""
    if python == sys.executable:
        return guard_library(device_type)
    code = f"from megatron_rb.platform.guard import guard_library; print(guard_library({device_type!r}))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{python} cannot be used for a rehearsal: {done.stderr.strip().splitlines()[-1]}")
    return Path(done.stdout.strip().splitlines()[-1])


def _environment(library: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in DROPPED and not name.startswith("SLURM_")}
    # The library has to be there before torch looks for CUDA; nothing is compiled, for nothing runs.
    return kept | preloading(library) | {"TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}


def _check(folders: Sequence[Path], workers: Sequence[subprocess.Popen[bytes]]) -> None:
    for folder, worker in zip(folders, workers, strict=True):
        if worker.poll():
            words = last_words((folder / LOG_FILE).read_text(errors="replace"))
            raise ValueError(f"{_unfinished(folder)} cannot be rehearsed{words}")


def _unfinished(folder: Path) -> str:
    """The first rank of a process that has no record."""
    for file in sorted(folder.glob(f"*/{JOB_FILE}")):
        job = RehearsalJob.read(file.parent)
        missing = [rank for rank in job.ranks if not (file.parent / f"rank_{rank}.pickle").is_file()]
        if missing:
            return f"rank {missing[0]} of {job.name}"
    return "a kernel"


def last_words(log: str) -> str:
    """The sentence that the process ended with; else the end of what it said."""
    lines = [line for line in log.splitlines() if _tells(line)]
    if lines and lines[-1].startswith(TOLD):
        return f": {lines[-1].removeprefix(TOLD)}"
    return ":\n" + "\n".join(lines[-LAST_LINES:]) if lines else ", and its process says nothing"


def _tells(line: str) -> bool:
    return bool(line.strip()) and "registered at" not in line and "(rb --debug" not in line
