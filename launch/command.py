"""From a `JobSpec` to the command line and environment of each process: arithmetic on text, nothing is started here."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_rb.launch.job import JobSpec

RUN_VARIABLES = ("RB_RUN_ID", "RB_ATTEMPT", "RB_FENCE", "RB_BEATS", "RB_STACKS", "RB_NUMBER", "RB_NODE")
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class RankCommand:
    """What is started for one rank."""

    rank: int
    argv: tuple[str, ...]
    env: Mapping[str, str]
    """Added to the environment of the launcher."""
    log: Path


def build_commands(job: JobSpec, python: str, env: Mapping[str, str] | None = None) -> tuple[RankCommand, ...]:
    """One command per rank of a job on this machine.

    Args:
        env: of this attempt, for every rank.

    Raises:
        ValueError: `job.env` sets a variable by which a process learns its rank.
    """
    check_environment(job.env)
    argv = (python, *rank_argv(job)[1:])
    return tuple(
        RankCommand(rank, argv, {**_environment(job, rank), **(env or {})}, job.run_dir / "logs" / f"rank_{rank}.log")
        for rank in range(job.processes)
    )


def threads_per_rank(configured: int, cores: int, processes: int) -> int:
    """CPU threads of a rank: as configured, else an even share of the cores."""
    return configured or max(1, cores // processes)


def shell_line(command: RankCommand) -> str:
    """The command as one line that a shell can run."""
    variables = " ".join(f"{name}={shlex.quote(value)}" for name, value in command.env.items())
    return f"{variables} {shlex.join(command.argv)}"


def rank_argv(job: JobSpec) -> tuple[str, ...]:
    """The command line of a rank, the same for all."""
    return (job.python, "-m", job.module, *job.arguments)


def check_environment(values: Mapping[str, str], setting: str = "cluster.env") -> None:
    """Raise ValueError for a variable that the launcher sets itself, or whose name no shell takes."""
    taken = sorted({*RANK_VARIABLES, *RUN_VARIABLES} & set(values))
    if taken:
        raise ValueError(f"{setting} must not set {', '.join(taken)}: the launcher gives each process its own")
    odd = [name for name in values if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII)]
    if odd:
        raise ValueError(f"{setting}: '{odd[0]}' is no name of a variable; use letters, digits and _")
    cut = [name for name, value in values.items() if "\0" in value]
    if cut:
        raise ValueError(f"{setting}.{cut[0]} holds a NUL character, which no environment can carry")


def job_environment(job: JobSpec) -> dict[str, str]:
    """What every process of the run has in its environment, in every attempt."""
    return {
        "OMP_NUM_THREADS": str(job.threads_per_rank),
        "PYTHONUNBUFFERED": "1",  # a process that is killed leaves its last line in the log
        "TORCHDYNAMO_DISABLE": "1",  # megatron-core compiles small functions, which needs a C++ compiler on every node
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # torchrun's own store keeps addresses of processes that are gone
        "TORCH_FR_BUFFER_SIZE": "2000",  # collectives that are remembered for the case of a hang
        **job.env,
        "RB_RUN_ID": job.run_id,
        "RB_FENCE": str(job.launch_dir / "attempt"),
    }


def _environment(job: JobSpec, rank: int) -> dict[str, str]:
    own = {name: value for name, value in job_environment(job).items() if name not in ("RB_RUN_ID", "RB_FENCE")}
    return {
        **own,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(job.processes),
        "LOCAL_WORLD_SIZE": str(job.processes),
        "MASTER_ADDR": job.master_addr or "127.0.0.1",
        "MASTER_PORT": str(job.master_port or 29500),
    }
