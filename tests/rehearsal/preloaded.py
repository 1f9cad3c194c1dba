"""Workers of rehearsals, forked from processes that have imported what a rehearsal on their kind of device needs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from megatron_rb.rehearsal.job import JOB_FILE, RehearsalJob
from megatron_rb.rehearsal.worker import rehearse_job
from tests.distributed.forked import ForkedProcess, environment_of_tests, server_for


def preload(folder: str) -> None:
    """Import what the job in this folder needs, among its stand-ins; none of its ranks is rehearsed."""
    job = RehearsalJob.read(Path(folder))
    rehearse_job(replace(job, ranks=[], compiled=False), Path(folder))


def fork_worker(command: Sequence[str], environment: Mapping[str, str], log: BinaryIO) -> ForkedProcess:
    """In place of `run.start_worker`. What megatron-core finds installed it finds at its import: releases that are
    stood in for have processes of their own to fork from."""
    _, _, module, *arguments = command
    folder = next(Path(arguments[-1]).glob(f"*/{JOB_FILE}")).parent
    job = RehearsalJob.read(folder)
    environment = environment_of_tests() | dict(environment)
    preloading = "tests.rehearsal.preloaded:preload", str(folder)
    server = server_for(environment, preload=preloading, name=f"{job.device_type} {sorted(job.packages.items())}")
    request = {"module": module, "arguments": arguments, "folder": os.getcwd(), "environment": environment}
    with open(os.devnull, "rb") as nothing:
        return server.fork(request, (nothing.fileno(), log.fileno(), log.fileno()))
