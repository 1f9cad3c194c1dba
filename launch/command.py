"""From a `JobSpec` to the command line and environment of each process: arithmetic on text, nothing is started here."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_rb.launch.job import JobSpec

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class RankCommand:
    """What is started for one rank."""

    rank: int
    argv: tuple[str, ...]
    env: Mapping[str, str]
    """Added to the environment of the launcher."""
    log: Path


def build_commands(job: JobSpec, python: str) -> tuple[RankCommand, ...]:
    """One command per rank.

    Raises:
        ValueError: `job.env` sets a variable by which a process learns its rank.
    """
    taken = sorted(set(RANK_VARIABLES) & set(job.env))
    if taken:
        raise ValueError(f"cluster.env must not set {', '.join(taken)}: the launcher gives each process its own")
    argv = (python, "-m", job.module, *job.arguments)
    return tuple(
        RankCommand(rank, argv, _environment(job, rank), job.run_dir / "logs" / f"rank_{rank}.log")
        for rank in range(job.processes)
    )


def threads_per_rank(configured: int, cores: int, processes: int) -> int:
    """CPU threads of a rank: as configured, else an even share of the cores."""
    return configured or max(1, cores // processes)


def shell_line(command: RankCommand) -> str:
    """The command as one line that a shell can run."""
    variables = " ".join(f"{name}={shlex.quote(value)}" for name, value in command.env.items())
    return f"{variables} {shlex.join(command.argv)}"


def _environment(job: JobSpec, rank: int) -> dict[str, str]:
    return {
        "OMP_NUM_THREADS": str(job.threads_per_rank),
        "PYTHONUNBUFFERED": "1",  # a process that is killed leaves its last line in the log
        "TORCHDYNAMO_DISABLE": "1",  # megatron-core compiles small functions, which needs a C++ compiler on every node
        **job.env,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(job.processes),
        "LOCAL_WORLD_SIZE": str(job.processes),
        "MASTER_ADDR": job.master_addr,
        "MASTER_PORT": str(job.master_port),
    }
