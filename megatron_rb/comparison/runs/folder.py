"""One run as it is compared: its curves as arrays, its recipe, and what is odd about its record."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rb.config.compose import config_from_file
from megatron_rb.config.schema import Config
from megatron_rb.metrics.jsonl import count_repeated_steps, read_metrics
from megatron_rb.metrics.report import column
from megatron_rb.metrics.writers import METRICS_FILE


@dataclass(frozen=True)
class RecordedRun:
    """What a run folder says about a run; of a step that was done twice the later record counts."""

    name: str
    steps: list[dict[str, Any]]
    """The step lines of metrics.jsonl, by step."""
    evaluations: dict[int, dict[str, float]]
    config: Config | None
    """None when there is only a metrics.jsonl."""
    notes: list[str]
    """What a reader of the comparison should know about this run."""

    def column(self, name: str) -> np.ndarray:
        return column(self.steps, name)


def read_run(path: str | Path, name: str) -> RecordedRun:
    """Read a run folder, or a `metrics.jsonl` alone.

    Raises:
        ValueError: there is no such file, or it holds no steps.
    """
    path = Path(path)
    file = path / METRICS_FILE if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{file} does not exist; give the folder of a run that has made steps, or its {METRICS_FILE}")
    steps, evaluations = read_metrics(file)
    if not steps:
        raise ValueError(f"{file} holds no steps yet; wait for the run to make some")
    config_file = file.with_name("config.yaml")
    config = config_from_file(config_file) if config_file.is_file() else None
    measured = {entry["step"]: {key: float(value) for key, value in entry["values"].items()} for entry in evaluations}
    return RecordedRun(name, steps, measured, config, _notes(file, steps, config))


def _notes(file: Path, steps: list[dict[str, Any]], config: Config | None) -> list[str]:
    notes = []
    repeated = count_repeated_steps(file)
    if repeated:
        notes.append(
            f"{repeated} steps stand in {file.name} more than once (done again after a fault); the last counts"
        )
    first, last = steps[0]["step"], steps[-1]["step"]
    missing = last - first + 1 - len(steps)
    if missing or first > 1:
        notes.append(f"{missing + first - 1} of the first {last} steps are not in {file.name}")
    if config is not None and last < config.schedule.train_steps:
        notes.append(f"the run stands at step {last} of {config.schedule.train_steps}; its end is not its final loss")
    attempts = _attempts(file.with_name("run.json"))
    if attempts > 1:
        notes.append(f"the run took {attempts} attempts (run.json says why)")
    return notes


def _attempts(record: Path) -> int:
    if not record.is_file():
        return 0
    return len(json.loads(record.read_text()).get("attempts", []))
