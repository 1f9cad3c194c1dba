"""`metrics.jsonl`: every step and evaluation of a run as one line of JSON.

A line is `{"kind": "step", ...}` with the numbers of `metrics.columns`, or an evaluation,
`{"kind": "eval", "step": ..., "values": {...}}`.
JSON has no NaN and no infinity; they are written as the strings "nan", "inf" and "-inf", which Python's `float` reads.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_rb.metrics.columns import values
from megatron_rb.metrics.record import EvalRecord, StepRecord
from megatron_rb.metrics.stragglers import RankRecord


class JsonlWriter:
    """Appends to a file; a line is on disk when the call returns.

    Args:
        first_step: step the run continues from (0 = a new run). Lines past it, and cut-off ones, are dropped.
    """

    def __init__(self, path: str | Path, first_step: int) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _drop_later_lines(self.path, first_step)
        self._file = self.path.open("a", encoding="utf-8")

    def write_step(self, record: StepRecord) -> None:
        self._write({"kind": "step", **values(record)})

    def write_eval(self, record: EvalRecord) -> None:
        self._write({"kind": "eval", **asdict(record)})

    def write_ranks(self, record: RankRecord) -> None:
        """Not kept here: metrics.jsonl is the record of the run, not of its machines."""

    def close(self) -> None:
        self._file.close()

    def _write(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(_finite(entry), allow_nan=False) + "\n")
        self._file.flush()


def read_metrics(path: str | Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The step lines and the evaluation lines of a file, in order of steps; of two lines of one step the later counts.

    Lines stay as they are written: see above for numbers that are not finite.
    """
    kinds: dict[str, dict[int, dict[str, Any]]] = {"step": {}, "eval": {}}
    for line in Path(path).read_bytes().splitlines():
        entry = _parse(line)
        if entry is not None:
            kinds[entry["kind"]][entry["step"]] = entry
    steps, evaluations = ([entries[step] for step in sorted(entries)] for entries in kinds.values())
    return steps, evaluations


def skipped_updates(path: str | Path) -> int:
    """Updates that a run had skipped when it wrote its last step line; 0 without a file."""
    steps = read_metrics(path)[0] if Path(path).is_file() else []
    return int(steps[-1].get("skipped_updates", 0)) if steps else 0


def count_repeated_steps(path: str | Path) -> int:
    """Steps that a file records more than once: a run that was put together from parts, or whose writer was lost."""
    seen: Counter[int] = Counter()
    for line in Path(path).read_bytes().splitlines():
        entry = _parse(line)
        if entry is not None and entry["kind"] == "step":
            seen[entry["step"]] += 1
    return sum(count > 1 for count in seen.values())


def _drop_later_lines(path: Path, first_step: int) -> None:
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if (entry := _parse(line)) is not None and entry["step"] <= first_step]
    # A step of 0 is an evaluation of the first weights: a new run makes its own.
    kept = kept if first_step else []
    if kept == lines and all(line.endswith(b"\n") for line in lines):
        return
    fresh = path.with_name(path.name + ".tmp")
    fresh.write_bytes(b"".join(line.rstrip(b"\n") + b"\n" for line in kept))
    os.replace(fresh, path)


def _parse(line: bytes) -> dict[str, Any] | None:
    """None for a line that a crash cut off."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    complete = isinstance(entry, dict) and entry.get("kind") in ("step", "eval") and isinstance(entry.get("step"), int)
    return entry if complete else None


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
