"""Starts equal worker processes on this machine for the commands that need several."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from megatron_rb.launch.command import threads_per_rank
from megatron_rb.launch.job import WORKER, JobSpec
from megatron_rb.launch.local import free_port
from megatron_rb.launch.main import run_job


def start_workers(
    function: str, folder: Path, processes: int, threads: int = 0, env: Mapping[str, str] | None = None
) -> int:
    """Run a `module:function` on a folder in so many processes and wait; 0, or the exit code of the first that failed.

    The folder gets a log per rank; rank 0 writes to the console.

    Args:
        threads: CPU threads of a process; 0 = an even share of the cores.
        env: further variables of every process.
    """
    debug = ["--debug"] if "--debug" in sys.argv else []  # as `rb --debug` was called
    job = JobSpec(
        WORKER,
        (function, str(folder), *debug),
        processes,
        folder,
        master_port=free_port("127.0.0.1"),
        threads_per_rank=threads_per_rank(threads, len(os.sched_getaffinity(0)), processes),
        env=env or {},
    )
    return run_job(job)
