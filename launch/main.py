"""Starts a run on this machine and stays until it has ended; imports no torch."""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megatron_rb.config.compose import save_config
from megatron_rb.config.derive import Derived
from megatron_rb.config.schema import Config
from megatron_rb.launch.command import build_commands, shell_line, threads_per_rank
from megatron_rb.launch.job import JobSpec
from megatron_rb.launch.local import free_port, start_ranks
from megatron_rb.launch.supervise import Supervisor, caught_signals

WORKER = "megatron_rb.train.main"


def build_job(config: Config, derived: Derived, arguments: Sequence[str]) -> JobSpec:
    """The job of a config on this machine.

    Raises:
        ValueError: the config asks for more than one machine.
    """
    cluster = config.cluster
    if cluster.num_nodes > 1:
        raise ValueError(
            f"cluster '{cluster.name}' starts processes on this machine only, num_nodes is {cluster.num_nodes}; "
            f"start `rb train` on every machine with srun or torchrun instead"
        )
    return JobSpec(
        module=WORKER,
        arguments=tuple(arguments),
        processes=derived.processes_per_node,
        run_dir=derived.run_dir,
        master_addr=cluster.master_addr,
        master_port=cluster.master_port or free_port(cluster.master_addr),
        threads_per_rank=threads_per_rank(
            config.platform.threads_per_rank, len(os.sched_getaffinity(0)), derived.processes_per_node
        ),
        env=cluster.env,
        grace_seconds=cluster.grace_seconds,
    )


def run_job(job: JobSpec) -> int:
    """Start all ranks and wait; 0, or the code that the launcher shall exit with."""
    commands = build_commands(job, sys.executable)
    with caught_signals() as received:
        return Supervisor(start_ranks(commands), received, job.grace_seconds).run()


def launch(config: Config, derived: Derived, arguments: Sequence[str]) -> int:
    """Write the config into the run folder, start its processes and wait for them."""
    job = build_job(config, derived, arguments)
    with _own_folder(job.run_dir):
        save_config(config, job.run_dir / "config.yaml")
        print(f"{config.name}: {job.processes} processes, logs in {job.run_dir / 'logs'}", flush=True)
        return run_job(job)


def dry_run(config: Config, derived: Derived, arguments: Sequence[str]) -> int:
    """Print what `launch` would start."""
    for command in build_commands(build_job(config, derived, arguments), sys.executable):
        print(shell_line(command))
    return 0


@contextmanager
def _own_folder(run_dir: Path) -> Iterator[None]:
    """Two runs in one folder would overwrite each other's checkpoints; the lock goes with the launcher's end."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with open(run_dir / "launch.lock", "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            raise ValueError(
                f"{run_dir} is in use by another launch (process {lock.read().strip()}); "
                f"wait for it, or choose another folder with name=... or run_dir=..."
            ) from error
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield
