"""Workers of rehearsals, forked from processes that have imported what a rehearsal on their kind of device needs."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import torch

from megatron_rb.config.compose import CONFIG_FILE, config_from_file
from megatron_rb.models.kernel_report import kernel_report
from megatron_rb.rehearsal.job import JOB_FILE, RUN_FOLDER, RehearsalJob
from megatron_rb.rehearsal.worker import stood_in
from tests.distributed.forked import ForkedProcess, environment_of_tests, server_for

RANK = "megatron_rb.rehearsal.rank"
"""Imports megatron-core, which has to see the stand-ins."""


def preload(folder: str) -> None:
    """Import what the job in this folder needs, among its stand-ins; none of its ranks is rehearsed, for that would
    start threads."""
    job = RehearsalJob.read(Path(folder))
    config = config_from_file(Path(folder) / RUN_FOLDER / CONFIG_FILE)
    with stood_in(job, config) as process:
        importlib.import_module(RANK)
        kernel_report(process.platform, torch.bfloat16)  # imports the packages of kernels


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
