"""One attempt: the machines it takes, where its ranks run, and the words in which supervisors report."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

from megatron_rb.launch.job import write_whole

STOP_FILE = "stop"
"""In the launch folder: the user has asked the run to end."""


@dataclass(frozen=True)
class AttemptPlan:
    """What every machine of an attempt is told."""

    number: int
    id: str
    """Unique over all attempts of all runs; a checkpoint writer must hold it."""
    nodes: tuple[str, ...]
    """In the order of ranks."""
    master_addr: str
    master_port: int
    slowest: dict[str, float] = field(default_factory=dict)
    """See `Limits`."""
    loop_node: str = ""
    """Machine of the process that keeps the run going."""

    def save(self, run_dir: Path) -> None:
        """Write the plan and make this the attempt that owns the run."""
        write_whole(plan_file(run_dir, self.number), json.dumps(dataclasses.asdict(self), indent=1))
        write_whole(fence_file(run_dir), self.id)


def load_plan(run_dir: Path, number: int) -> AttemptPlan:
    data = json.loads(plan_file(run_dir, number).read_text())
    return AttemptPlan(**data | {"nodes": tuple(data["nodes"])})


def plan_file(run_dir: Path, number: int) -> Path:
    return run_dir / "launch" / f"attempt_{number}.json"


def fence_file(run_dir: Path) -> Path:
    """Holds the id of the attempt that owns the run."""
    return run_dir / "launch" / "attempt"


def give_up_ownership(run_dir: Path, plan: AttemptPlan) -> None:
    """End the attempt: its supervisors kill their ranks when they see this, and nothing of it may write any more."""
    write_whole(fence_file(run_dir), f"{plan.id}/ended")


def sign_of_life(run_dir: Path) -> Path:
    """File that the process which keeps the run going changes all the time."""
    return run_dir / "launch" / "ranks.json"


def owner(run_dir: Path) -> str:
    """Id of the attempt that owns the run; empty before the first."""
    path = fence_file(run_dir)
    return path.read_text().strip() if path.is_file() else ""


def beats_dir(run_id: str, number: int, node: str) -> Path:
    """Folder in the memory of a machine in which the processes of an attempt report their progress."""
    memory = Path("/dev/shm")
    return (memory if memory.is_dir() else Path("/tmp")) / f"rb-{run_id}-{number}-{node}"


def stacks_dir(run_dir: Path, number: int) -> Path:
    """Folder for the stacks of processes that hang."""
    return run_dir / "stacks" / f"attempt_{number}"
