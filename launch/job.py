"""`JobSpec`: everything a launcher must know to start the processes of a run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WORKER = "megatron_rb.app.worker"
"""The module of every worker process; its arguments are `module:function` and a folder."""
JOB_FILE = "job.json"


@dataclass(frozen=True)
class Host:
    """A machine of a host file."""

    name: str
    slots: int = 0
    """Devices; 0 = not stated."""
    type: str = ""
    """Kind of device, in the words of the site."""


@dataclass(frozen=True)
class Patience:
    """How long the supervisors wait for what, in seconds."""

    grace: float = 30.0
    """To leave after a signal before a process is killed."""
    silence: float = 4.0
    """Without a word from a machine until it counts as lost."""
    hang: float = 1800.0
    """Without progress in a phase whose usual time is not known yet."""
    comeback: float = 30.0
    """For a lost machine to answer again when no spare is left."""
    least: float = 0.0
    """No learnt limit is shorter."""


@dataclass(frozen=True)
class SshSpec:
    """How machines are reached by OpenSSH."""

    hosts: tuple[Host, ...] = ()
    options: tuple[str, ...] = ()
    fan_out: int = 64
    connect_seconds: float = 10.0


@dataclass(frozen=True)
class JobSpec:
    """One world of equal processes that differ in nothing but their rank."""

    module: str
    """Started as `python -m module`."""
    arguments: tuple[str, ...]
    """Given to every process."""
    processes: int
    """On each machine."""
    run_dir: Path
    """Its `logs` folder gets one file per rank."""
    master_addr: str = ""
    """Empty = the machine of rank 0."""
    master_port: int = 0
    """0 = a free one."""
    threads_per_rank: int = 1
    env: Mapping[str, str] = field(default_factory=dict)
    """Added to the environment of every process; wins over what the launcher sets by itself, except for the ranks."""
    name: str = "run"
    run_id: str = "run"
    engine: str = "local"
    """`local`, `ssh` or `slurm`."""
    launcher: str = "direct"
    """`direct`, `srun`, `torchrun` or `ft_launcher`."""
    nodes: int = 1
    spare_nodes: int = 0
    max_retries: int = 0
    python: str = "python3"
    host_python: str = "python3"
    work_dir: Path = Path(".")
    checkpoint_dir: Path = Path("checkpoints")
    tp_size: int = 1
    pp_size: int = 1
    cp_size: int = 1
    after: str = ""
    """Slurm job that must have finished well before this one starts; empty = none."""
    node_env: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """By machine, after `env`."""
    secrets: tuple[str, ...] = ()
    """Names of variables that are handed on and never written down."""
    patience: Patience = Patience()
    ssh: SshSpec = SshSpec()

    @property
    def world_size(self) -> int:
        return self.nodes * self.processes

    @property
    def launch_dir(self) -> Path:
        """Scripts and state of the launcher."""
        return self.run_dir / "launch"

    def save(self) -> None:
        """Write `launch/job.json`."""
        write_whole(self.launch_dir / JOB_FILE, json.dumps(dataclasses.asdict(self), indent=1, default=str))


def load_job(run_dir: Path) -> JobSpec:
    """Read what `JobSpec.save` wrote.

    Raises:
        ValueError: the folder is not one that `rb launch` made.
    """
    path = run_dir / "launch" / JOB_FILE
    if not path.is_file():
        raise ValueError(f"{run_dir} is not the folder of a run: there is no {path}; give run_dir=... or name=...")
    data: dict[str, Any] = json.loads(path.read_text())
    ssh = data["ssh"]
    data["ssh"] = SshSpec(
        tuple(Host(**host) for host in ssh["hosts"]), tuple(ssh["options"]), ssh["fan_out"], ssh["connect_seconds"]
    )
    data["patience"] = Patience(**data["patience"])
    for name in ("run_dir", "work_dir", "checkpoint_dir"):
        data[name] = Path(data[name])
    for name in ("arguments", "secrets"):
        data[name] = tuple(data[name])
    return JobSpec(**data)


def write_whole(path: Path, text: str, mode: int = 0o644) -> None:
    """Write a file that no reader ever sees in part.

    Raises:
        OSError: it cannot be written, with its name; nothing of it stays behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text)
        partial.chmod(mode)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
