"""What a run is doing, from its folder and, under Slurm, from the scheduler."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_rb.launch import slurm
from megatron_rb.launch.job import load_job
from megatron_rb.launch.record import (
    ENDED,
    FAILED,
    QUEUED,
    RECORD,
    RUNNING,
    RunRecord,
    load_record,
    newest_checkpoint,
    read_steps,
)


@dataclass(frozen=True)
class RunStatus:
    """One run at a glance."""

    run_id: str
    state: str
    """QUEUED, RUNNING, COMPLETED, FAILED or STOPPED."""
    step: int
    attempt: int
    loss: float | str | None
    tokens_per_second: float | None
    skipped_updates: int
    """Steps whose update was left out: numbers not finite, or nothing to learn."""
    last_checkpoint: int
    nodes: list[str]
    reason: str
    slow: str
    """The rank that holds the others up, and its section; empty = none stands out."""
    ettr: float | None
    engine: str
    job_id: str
    run_dir: str

    def line(self) -> str:
        """All of it in one line."""
        parts = [f"{self.run_id}  {self.state}", f"step {self.step}", f"attempt {self.attempt}"]
        if self.loss is not None:
            parts.append(f"loss {float(self.loss):.4f}")
        if self.tokens_per_second is not None:
            parts.append(f"{self.tokens_per_second:.0f} tokens/s")
        if self.skipped_updates:
            parts.append(f"{self.skipped_updates} updates skipped")
        parts.append(f"checkpoint {self.last_checkpoint or 'none'}")
        parts += [f"nodes {','.join(self.nodes)}"] if self.nodes else []
        parts += [f"slow: {self.slow}"] if self.slow else []
        parts += [f"ETTR {self.ettr:.1%}"] if self.ettr is not None else []
        return "  ".join(parts + ([self.reason] if self.reason else []))

    def json(self) -> str:
        return json.dumps(asdict(self))


def run_status(run_dir: Path) -> RunStatus:
    """Status of one run.

    Raises:
        ValueError: the folder holds no run.
    """
    job, record = load_job(run_dir), load_record(run_dir)
    if record is None:
        raise ValueError(f"{run_dir} was prepared but never started; start it with action=run")
    state, reason = present_state(record)
    steps = read_steps(run_dir, last=5)
    newest = steps[-1] if steps else {}
    attempt = record.attempts[-1] if record.attempts else None
    return RunStatus(
        run_id=record.run_id,
        state=state,
        step=newest.get("step", 0),
        attempt=attempt.number if attempt else 0,
        loss=newest.get("loss"),
        tokens_per_second=newest.get("tokens_per_second"),
        skipped_updates=newest.get("skipped_updates", 0),
        last_checkpoint=newest_checkpoint(job.checkpoint_dir),
        nodes=attempt.nodes if attempt else [],
        reason=reason,
        slow=_slow(run_dir) if state == RUNNING else "",
        ettr=record.ettr,
        engine=record.engine,
        job_id=record.job_id,
        run_dir=str(run_dir),
    )


def all_runs(folder: Path) -> Iterator[RunStatus]:
    """Every run below a folder, the newest first."""
    records = sorted(folder.glob(f"**/{RECORD}"), key=lambda path: path.stat().st_mtime, reverse=True)
    yield from (run_status(path.parent) for path in records)


def present_state(record: RunRecord) -> tuple[str, str]:
    """State and reason, asked from where the run is kept going when its record says that it is."""
    if record.state in ENDED:
        return record.state, record.reason
    if record.engine == "slurm":
        return _slurm_state(record)
    if process_lives(record.job_id):
        return record.state, record.reason
    return FAILED, f"the process that kept it going ({record.job_id}) is gone; the same command continues the run"


def process_lives(place: str) -> bool:
    """Whether the process `host:pid` runs; a process of another machine is taken to."""
    host, _, pid = place.rpartition(":")
    if host != socket.gethostname():
        return bool(host)
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        return int(pid) == os.getpid() or b"megatron_rb" in command or b"/rb" in command
    except OSError:
        return False


def _slurm_state(record: RunRecord) -> tuple[str, str]:
    job = slurm.job_state(record.job_id) if record.job_id else None
    if job is None:
        return FAILED, f"Slurm does not know job {record.job_id} any more, and the run did not say how it ended"
    if job.state == QUEUED:
        waits = f"Slurm: {job.word}, {job.reason}"
        return QUEUED, f"{record.reason}; {waits}" if record.reason else waits
    if job.state == RUNNING:
        return (RUNNING if record.attempts else QUEUED), record.reason
    return job.state, f"Slurm: {job.word}" + (f", {job.reason}" if job.reason not in ("", "None") else "")


def _slow(run_dir: Path) -> str:
    path = run_dir / "stragglers.json"
    if not path.is_file():
        return ""
    data: dict[str, Any] = json.loads(path.read_text())
    return data.get("slow", "")
