"""Is result B slower than result A? A gate that knows the noise of both."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from typing import Any

from megatron_rb.bench.train.result import Result

LEAST_STEPS = 4
"""Fewer timed steps say nothing about their spread."""


@dataclass(frozen=True)
class SpeedComparison:
    """B beside A, by the median token rate per device."""

    change: float
    """Rate of B over that of A, less 1: negative = slower."""
    noise: float
    """Sum of both results' noise."""
    limit: float
    """Share of speed that may be lost beyond the noise."""
    rows: tuple[tuple[str, float, float], ...]
    """Name, A, B of every figure of the summary."""
    notes: tuple[str, ...]
    """Settings in which the results differ though they may be compared."""

    @property
    def passed(self) -> bool:
        return self.change >= -(self.limit + self.noise)


def compare(a: Result, b: Result, limit: float) -> SpeedComparison:
    """
    Args:
        limit: share of speed that B may lose beyond the noise, e.g. 0.03.

    Raises:
        ValueError: the results are of different mixes, models or devices, or too short to know their noise.
    """
    if not 0 <= limit < 1:
        raise ValueError(f"the limit is {limit:.0%}; it must be at least 0 % and below 100 %")
    for name, result in (("A", a), ("B", b)):
        if len(result.steps) < LEAST_STEPS:
            raise ValueError(
                f"{name} has {len(result.steps)} timed steps, whose noise is not known; measure at least {LEAST_STEPS} "
                f"with --steps"
            )
    _refuse_other_subjects(a, b)
    first, second = (statistics.median(result.token_rates()) for result in (a, b))
    one, two = a.summary(), b.summary()
    rows = tuple((name, one[name], two[name]) for name in one)
    return SpeedComparison(second / first - 1, a.noise() + b.noise(), limit, rows, tuple(_notes(a, b)))


def _refuse_other_subjects(a: Result, b: Result) -> None:
    """A rate says something about another one when both are of the same work on the same kind of device."""
    subjects = {
        "mix": (a.mix, b.mix),
        "model": (a.model, b.model),
        "device": (_kind_of_device(a), _kind_of_device(b)),
        "dtype": ({"dtype": a.settings["dtype"]}, {"dtype": b.settings["dtype"]}),
    }
    for what, (ours, theirs) in subjects.items():
        different = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
        if different:
            said = "; ".join(
                f"{key} is {_short(ours.get(key))} in A and {_short(theirs.get(key))} in B" for key in different[:3]
            )
            raise ValueError(f"A and B are not of the same {what}: {said}; compare results of one {what}")


def _kind_of_device(result: Result) -> dict[str, Any]:
    kind = {key: result.device.get(key) for key in ("platform", "device")}
    # A core more or less is another device where a process computes on cores.
    return kind | ({"threads per process": result.settings["threads"]} if kind["platform"] == "cpu" else {})


def _notes(a: Result, b: Result) -> list[str]:
    notes = []
    pairs = {"settings": (a.settings, b.settings), "versions": (a.versions, b.versions)}
    for ours, theirs in pairs.values():
        for key in {**ours, **theirs}:
            if ours.get(key) != theirs.get(key):
                notes.append(f"{key}: {_short(ours.get(key))} in A, {_short(theirs.get(key))} in B")
    if a.devices != b.devices:
        notes.append(f"devices: {a.devices} in A, {b.devices} in B (rates are per device)")
    if len(a.steps) != len(b.steps):
        notes.append(f"timed steps: {len(a.steps)} in A, {len(b.steps)} in B")
    return notes


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
