"""`run.json`: the record of a run with every attempt, why it ended, and the effective training time ratio."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_rb.launch.failure import FailureKind
from megatron_rb.launch.job import write_whole

RECORD = "run.json"
_COMPLETE = re.compile(r"step_(\d{8,})$")

QUEUED, RUNNING, COMPLETED, FAILED, STOPPED = "QUEUED", "RUNNING", "COMPLETED", "FAILED", "STOPPED"
ENDED = (COMPLETED, FAILED, STOPPED)


@dataclass
class AttemptNote:
    """One start of all processes. Times are seconds since the epoch."""

    number: int
    id: str
    nodes: list[str]
    started: float
    resumed_from: int
    """Step of the checkpoint it began with; 0 = a new run."""
    job_id: str = ""
    first_step_at: float | None = None
    noticed_at: float | None = None
    """When its failure was known; None where only its end is."""
    ended: float | None = None
    outcome: str = ""
    """`finished`, `stopped` or `failed`; empty = still running."""
    last_step: int = 0
    lost_steps: int = 0
    """Steps done in this attempt that no checkpoint holds."""
    kind: FailureKind | Literal[""] = ""
    """Of the failure; empty = it has not failed."""
    cause: str = ""
    rank: int | None = None
    node: str = ""
    phase: str = ""
    exit_code: int | None = None


@dataclass
class RunRecord:
    """What is known about a run; only the process that owns the present attempt writes it."""

    run_id: str
    name: str
    engine: str
    state: str = QUEUED
    reason: str = ""
    job_id: str = ""
    """Of Slurm; or host:pid of the process that keeps the run going."""
    created: float = 0.0
    ended: float | None = None
    exit_code: int | None = None
    launched_at: int = 0
    """Attempts there were when it was last started by hand; only later ones decide whether it is tried again."""
    attempts: list[AttemptNote] = field(default_factory=list)
    bad_nodes: list[str] = field(default_factory=list)
    """Machines that failed and are not used again."""
    slowest: dict[str, float] = field(default_factory=dict)
    """Slowest time of each phase, in seconds, from which the time limits are taken."""
    ettr: float | None = None
    """Effective training time ratio: time in steps that count, over the time since the first attempt began."""

    def save(self, run_dir: Path) -> None:
        write_whole(run_dir / RECORD, json.dumps(asdict(self), indent=1))


def load_record(run_dir: Path) -> RunRecord | None:
    """The record of a run folder; None when there is none.

    Raises:
        ValueError: it names a kind of failure that there is not.
    """
    path = run_dir / RECORD
    if not path.is_file():
        return None
    data: dict[str, Any] = json.loads(path.read_text())
    data["attempts"] = [_attempt_note(note, path) for note in data["attempts"]]
    return RunRecord(**data)


def _attempt_note(entry: dict[str, Any], path: Path) -> AttemptNote:
    kind = entry.get("kind", "")
    if kind not in ("", *FailureKind):
        raise ValueError(
            f"{path}: attempt {entry['number']} failed by {kind!r}, which is no kind of failure; there are "
            f"{', '.join(FailureKind)}. Read it with the version that wrote it, or start in another run_dir"
        )
    return AttemptNote(**entry | {"kind": FailureKind(kind) if kind else ""})


def newest_checkpoint(folder: Path) -> int:
    """Step of the newest complete checkpoint in a folder; 0 = there is none."""
    names = (_COMPLETE.match(entry.name) for entry in folder.iterdir()) if folder.is_dir() else ()
    return max((int(match.group(1)) for match in names if match), default=0)


def read_steps(run_dir: Path, last: int = 0) -> list[dict[str, Any]]:
    """The step lines of `metrics.jsonl`, each step once and in order.

    Args:
        last: only about so many lines at the end of the file; 0 = all.
    """
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        return []
    with open(path, "rb") as file:
        if last:
            size = file.seek(0, 2)
            file.seek(max(0, size - last * 1024))
        lines = file.read().splitlines()
    steps: dict[int, dict[str, Any]] = {}
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # cut off by a crash, or by where reading began
        if isinstance(entry, dict) and entry.get("kind") == "step":
            steps[entry["step"]] = entry
    return [steps[step] for step in sorted(steps)]


def running_seconds(attempts: Sequence[AttemptNote], until: float) -> float:
    """Wall clock from the first attempt on, without the time in which the run was stopped on purpose."""
    total = until - attempts[0].started
    for earlier, later in zip(attempts, attempts[1:], strict=False):
        if earlier.outcome != "failed" and earlier.ended is not None:
            total -= later.started - earlier.ended
    return total


def effective_time_ratio(step_seconds: Sequence[float], wall_seconds: float) -> float | None:
    """Time in steps that count over the wall clock; None before any time has passed."""
    return min(1.0, sum(step_seconds) / wall_seconds) if wall_seconds > 0 else None


def now() -> float:
    """Seconds since the epoch, to the millisecond."""
    return round(time.time(), 3)
