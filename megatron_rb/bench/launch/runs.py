"""Runs of a tiny model under a real Slurm cluster (or over ssh), and what can be asked of them and done to them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_rb.bench.launch.cluster import SlurmCluster, wait_for
from megatron_rb.launch.prepare import TRAINING
from megatron_rb.launch.record import RunRecord, load_record, read_steps

REPOSITORY = Path(__file__).resolve().parents[3]
STEPS = 32


def model_settings(inputs: Path) -> list[str]:
    """A tiny model that really trains, cut into two pipeline stages, one process each."""
    return [
        f"model.hf_path={inputs / 'hf'}",
        "model.dtype=fp32",
        f"data.train=[{inputs / 'heldout.jsonl'}]",
        "data.seq_length=512",
        "data.max_patches=1024",
        "data.global_batch_size=6",
        "checkpoint.init=random",
        "optimizer.lr=1e-3",
        f"schedule.train_steps={STEPS}",
        "checkpoint.save_every=8",
        "checkpoint.asynchronous=false",
        "metrics.tensorboard=false",
        "metrics.plots=false",
        "platform.name=cpu",
        "parallel.tp_size=1",
        "parallel.pp_size=2",
        "parallel.layout=P v | v M E t*3 L",
        "cluster.grace_seconds=20",
        "cluster.least_hang_seconds=0",
    ]


@dataclass
class TinyRun:
    """A run and what the tests ask of it."""

    inputs: Path
    run_dir: Path
    cluster: SlurmCluster | None = None
    settings: list[str] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)

    def rb(self, *words: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """`rb launch` with the settings of this run."""
        return launch(
            *model_settings(self.inputs),
            *self.settings,
            f"run_dir={self.run_dir}",
            *words,
            env=self._environment(),
            timeout=timeout,
        )

    def act(self, action: str, *words: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """`rb launch` on the run that is there."""
        return launch(f"run_dir={self.run_dir}", f"action={action}", *words, env=self._environment(), timeout=timeout)

    def start(self, *words: str) -> TinyRun:
        done = self.rb(*words)
        assert done.returncode == 0, done.stdout + done.stderr
        return self

    def status(self) -> dict[str, Any]:
        done = self.act("status", "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    @property
    def record(self) -> RunRecord:
        record = load_record(self.run_dir)
        assert record is not None
        return record

    @property
    def step(self) -> int:
        steps = read_steps(self.run_dir, last=3)
        return steps[-1]["step"] if steps else 0

    def losses(self) -> dict[int, float]:
        return {entry["step"]: entry["loss"] for entry in read_steps(self.run_dir)}

    def wait_attempt(self, number: int, seconds: float = 60) -> None:
        """Wait until the attempt has done a step."""
        wait_for(
            lambda: len(self.record.attempts) >= number and self._stepping(number),
            seconds,
            lambda: f"attempt {number} made no step:\n{self.story()}",
        )

    def wait_step(self, step: int, seconds: float = 60) -> None:
        wait_for(lambda: self.step >= step, seconds, lambda: f"step {step} was not reached:\n{self.story()}")

    def wait_state(self, state: str, seconds: float = 90) -> None:
        wait_for(lambda: self.record.state == state, seconds, lambda: f"never {state}:\n{self.story()}")

    def nodes(self) -> list[str]:
        """Of the present attempt, in the order of ranks."""
        return self.record.attempts[-1].nodes

    def signal_ranks(self, node: str, signal: str) -> None:
        """Send a signal to the training processes of this run on a node."""
        assert self.cluster is not None
        found = self._pids(node)
        assert found, f"no rank on {node}:\n{self.story()}"
        self.cluster.execute(node, "kill", f"-{signal}", *found)

    def _pids(self, node: str) -> list[str]:
        """The training processes of this run on a node, by what stands at the end of their command line."""
        assert self.cluster is not None
        return self.cluster.execute(node, "pgrep", "-f", f"{TRAINING} {self.run_dir}$").split()

    def environment_of_rank(self, node: str) -> dict[str, str]:
        """Environment of a training process on a node."""
        assert self.cluster is not None
        pids = self._pids(node)
        words = self.cluster.execute(node, "cat", f"/proc/{pids[0]}/environ").split("\0")
        return dict(word.split("=", 1) for word in words if "=" in word)

    def process_environment(self) -> dict[str, str]:
        """For a process that is started by hand."""
        return {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **self._environment()}

    def kinds(self) -> list[str]:
        """Why each attempt failed; empty = it did not."""
        return [note.kind for note in self.record.attempts]

    def story(self) -> str:
        """Everything there is to know when a test fails."""
        logs = sorted((self.run_dir / "logs").glob("*")) if (self.run_dir / "logs").is_dir() else []
        parts = [f"== {log.name}\n{log.read_text(errors='replace')[-3000:]}" for log in logs]
        if self.cluster is not None:
            parts += [self.cluster.command("squeue", check=False), self.cluster.command("sinfo", check=False)]
            parts.append(self.cluster.errors())
        return "\n".join(parts)

    def _stepping(self, number: int) -> bool:
        path = self.run_dir / "launch" / "ranks.json"
        if self.record.attempts[number - 1].ended is not None:
            return True
        state: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"attempt": 0}
        return state["attempt"] == number and any(phase == "step" for phase, *_ in state["ranks"].values())

    def _environment(self) -> dict[str, str]:
        return {**(self.cluster.env if self.cluster is not None else {}), **self.env}


def launch(*words: str, env: dict[str, str] | None = None, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """`rb launch` as a user calls it."""
    own = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-m", "megatron_rb.cli", "launch", *words],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        env={**os.environ, **own, **(env or {})},
        timeout=timeout,
    )
