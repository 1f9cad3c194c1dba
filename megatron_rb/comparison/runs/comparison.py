"""Two runs of one recipe beside each other: final gap with its noise, gap over time, norms, rates, throughput."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from megatron_rb.comparison.runs.folder import RecordedRun
from megatron_rb.comparison.runs.gap import (
    LEAST_STEPS,
    Gap,
    Verdict,
    default_window,
    gap_over_time,
    relative_gap,
)
from megatron_rb.comparison.runs.recipe import differences, explain

BATCH_COUNTS = ("num_samples", "num_tokens", "num_labels", "num_patches")
SAME_RATE = 1e-6
"""Largest relative difference of learning rates that are the same."""


@dataclass(frozen=True)
class Beside:
    """One quantity of both runs."""

    name: str
    a: float
    b: float
    unit: str = ""

    @property
    def ratio(self) -> float:
        return self.b / self.a if self.a else math.nan


@dataclass(frozen=True)
class RunComparison:
    """Everything that is said about two runs. A is the reference."""

    a: RecordedRun
    b: RecordedRun
    threshold: float
    """Percent."""
    steps: np.ndarray
    """Steps that both have."""
    window: int
    """Steps that count as the end."""
    final: Gap
    verdict: Verdict
    reason: str
    over_time: list[tuple[int, Gap]]
    """(step, gap of the window that ends there)."""
    agreement: list[str]
    """Batches, gradient norms and learning rates, in words."""
    throughput: list[Beside]
    evaluations: list[tuple[int, Beside]]
    notes: list[str]

    def as_json(self) -> dict[str, Any]:
        """For a script: the same numbers without the curves."""
        return {
            "a": self.a.name,
            "b": self.b.name,
            "verdict": str(self.verdict),
            "reason": self.reason,
            "threshold_percent": self.threshold,
            "final_gap": asdict(self.final),
            "window_steps": self.window,
            "common_steps": len(self.steps),
            "last_step": int(self.steps[-1]),
            "gap_over_time": [{"step": step, **asdict(gap)} for step, gap in self.over_time],
            "agreement": self.agreement,
            "throughput": [asdict(row) | {"ratio": row.ratio} for row in self.throughput],
            "evaluations": [{"step": step, **asdict(row), "ratio": row.ratio} for step, row in self.evaluations],
            "notes": self.notes,
        }


def compare_runs(
    a: RecordedRun,
    b: RecordedRun,
    *,
    threshold: float,
    window: int = 0,
    allowed: Sequence[str] = (),
    check_recipe: bool = True,
) -> RunComparison:
    """Compare B with the reference A.

    Args:
        threshold: percent.
        window: steps at the end; 0 = `default_window`.
        allowed: settings that may differ beside those of the machine.

    Raises:
        ValueError: the runs are of different recipes, or have no steps in common.
    """
    if check_recipe:
        _check_recipe(a, b, allowed)
    steps, rows_a, rows_b = _common(a, b)
    loss_a, loss_b = a.column("loss")[rows_a], b.column("loss")[rows_b]
    window = min(window or default_window(len(steps)), len(steps))
    finite = np.isfinite(loss_a) & np.isfinite(loss_b)
    known = steps[finite]
    final, verdict, reason = _judge(a.name, b.name, loss_a, loss_b, window, threshold)
    over_time = gap_over_time(loss_a[finite], loss_b[finite], min(window, len(known))) if len(known) else []
    return RunComparison(
        a,
        b,
        threshold,
        steps,
        window,
        final,
        verdict,
        reason,
        [(int(known[place]), gap) for place, gap in over_time],
        [_batches(a, b, rows_a, rows_b), _norms(a, b, rows_a, rows_b), *_rates(a, b, rows_a, rows_b)],
        _throughput(a, b),
        _evaluations(a, b),
        _notes(a, b, steps, finite),
    )


def _check_recipe(a: RecordedRun, b: RecordedRun, allowed: Sequence[str]) -> None:
    for run in (a, b):
        if run.config is None:
            raise ValueError(
                f"{run.name} has no config.yaml beside its metrics.jsonl, so nobody can tell whether both runs are of "
                f"one recipe; give its run folder, or say --no-recipe to compare the curves alone"
            )
    assert a.config is not None and b.config is not None
    found = differences(a.config, b.config, allowed)
    if found:
        raise ValueError(explain(found, a.name, b.name))


def _common(a: RecordedRun, b: RecordedRun) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    left, right = (np.array([entry["step"] for entry in run.steps]) for run in (a, b))
    steps, rows_a, rows_b = np.intersect1d(left, right, assume_unique=True, return_indices=True)
    if not len(steps):
        spans = [f"{run.name} has steps {n[0]} to {n[-1]}" for run, n in ((a, left), (b, right))]
        raise ValueError(f"the runs have no step in common: {spans[0]}, {spans[1]}; compare runs that overlap")
    return steps, rows_a, rows_b


def _judge(
    name_a: str, name_b: str, a: np.ndarray, b: np.ndarray, window: int, threshold: float
) -> tuple[Gap, Verdict, str]:
    tail_a, tail_b = a[-window:], b[-window:]
    share_a, share_b = np.isfinite(tail_a).mean(), np.isfinite(tail_b).mean()
    finite = np.isfinite(tail_a) & np.isfinite(tail_b)
    if min(share_a, share_b) < 0.5:
        nothing = Gap(math.nan, math.inf, int(finite.sum()))
        if max(share_a, share_b) < 0.5:
            return nothing, Verdict.TOO_NOISY, "neither run has a finite loss at its end"
        lost = name_a if share_a < share_b else name_b
        return nothing, Verdict.DIFFER, f"{lost} has no finite loss at its end, the other run has"
    level = tail_a[finite].mean()
    if level <= 0:
        raise ValueError(f"the mean loss of {name_a} at its end is {level:g}; a gap in percent needs one above 0")
    gap = relative_gap(tail_a[finite], tail_b[finite])
    verdict = gap.verdict(threshold)
    return gap, verdict, _reason(gap, verdict, threshold)


def _reason(gap: Gap, verdict: Verdict, threshold: float) -> str:
    if gap.steps < LEAST_STEPS:
        return f"the window has {gap.steps} steps; at least {LEAST_STEPS} are needed to know the noise"
    low, high = gap.interval
    said = f"the 95 % interval {low:+.3f} % to {high:+.3f} %"
    if verdict is Verdict.AGREE:
        return f"{said} lies within +-{threshold:g} %"
    if verdict is Verdict.DIFFER:
        return f"{said} lies outside +-{threshold:g} %"
    room = abs(threshold - abs(gap.percent))
    needed = gap.steps * (gap.margin / room) ** 2 if room > 0 else math.inf
    advice = f"; about {needed:,.0f} steps would tell" if needed < 1e7 else ""
    return f"{said} crosses the border of +-{threshold:g} %{advice}, if the runs go on as they are"


def _batches(a: RecordedRun, b: RecordedRun, rows_a: np.ndarray, rows_b: np.ndarray) -> str:
    same = np.ones(len(rows_a), dtype=bool)
    for name in BATCH_COUNTS:
        same &= a.column(name)[rows_a] == b.column(name)[rows_b]
    if same.all():
        return f"batches: the counts of samples, tokens, labels and patches are equal in all {len(same)} steps"
    first = int(np.flatnonzero(~same)[0])
    step = a.steps[rows_a[first]]["step"]
    return (
        f"batches: counts are equal in {same.sum()} of {len(same)} steps, first different in step {step}: the runs "
        f"read other data or another order, so batch noise does not cancel"
    )


def _norms(a: RecordedRun, b: RecordedRun, rows_a: np.ndarray, rows_b: np.ndarray) -> str:
    left, right = a.column("grad_norm")[rows_a], b.column("grad_norm")[rows_b]
    fine = np.isfinite(left) & np.isfinite(right) & (left > 0) & (right > 0)
    if not fine.any():
        return "gradient norms: no step where both are known"
    low, middle, high = np.percentile(right[fine] / left[fine], [5, 50, 95])
    said = f"B / A has median {middle:.4f}, 90 % of the steps lie between {low:.4f} and {high:.4f}"
    return f"gradient norms differ: {said}" if low > 1 or high < 1 else f"gradient norms: {said}"


def _rates(a: RecordedRun, b: RecordedRun, rows_a: np.ndarray, rows_b: np.ndarray) -> list[str]:
    lines = []
    for part in a.steps[rows_a[-1]]["learning_rates"]:
        left, right = (
            np.array([float(run.steps[row]["learning_rates"].get(part, "nan")) for row in rows])
            for run, rows in ((a, rows_a), (b, rows_b))
        )
        gaps = np.abs(right - left) / np.maximum(np.abs(left), 1e-300)
        gaps[left == right] = 0.0
        wrong = np.flatnonzero(~(gaps <= SAME_RATE))
        if len(wrong):
            step = a.steps[rows_a[wrong[0]]]["step"]
            worst = f"first in step {step}: {left[wrong[0]]:.4g} and {right[wrong[0]]:.4g}"
            lines.append(f"learning rate of {part}: differs in {len(wrong)} steps, {worst}")
    return lines or ["learning rates: equal in all steps"]


def _throughput(a: RecordedRun, b: RecordedRun) -> list[Beside]:
    def median(run: RecordedRun, name: str) -> float:
        values = run.column(name)
        return float(np.nanmedian(values[1:] if len(values) > 4 else values))  # the first step also sets things up

    def wait(run: RecordedRun) -> float:
        return 100 * float(np.nansum(run.column("data_wait_seconds")) / max(np.nansum(run.column("seconds")), 1e-12))

    def memory(run: RecordedRun) -> float:
        values = run.column("memory_bytes")
        return float(np.nanmax(values)) / 2**30 if np.isfinite(values).any() else math.nan

    rows = [("tokens_per_second", "tokens/s"), ("patches_per_second", "patches/s"), ("seconds", "s")]
    return [
        *(Beside(f"median {name.replace('_', ' ')}", median(a, name), median(b, name), unit) for name, unit in rows),
        Beside("share of time waiting for data", wait(a), wait(b), "%"),
        Beside("peak memory", memory(a), memory(b), "GiB"),
    ]


def _evaluations(a: RecordedRun, b: RecordedRun) -> list[tuple[int, Beside]]:
    return [
        (step, Beside(name, value, b.evaluations[step][name]))
        for step, values in sorted(a.evaluations.items())
        if step in b.evaluations
        for name, value in values.items()
        if name in b.evaluations[step]
    ]


def _notes(a: RecordedRun, b: RecordedRun, steps: np.ndarray, finite: np.ndarray) -> list[str]:
    notes = [f"{run.name}: {note}" for run in (a, b) for note in run.notes]
    last_a, last_b = a.steps[-1]["step"], b.steps[-1]["step"]
    if last_a != last_b:
        notes.append(f"{a.name} ends at step {last_a}, {b.name} at step {last_b}: compared up to step {steps[-1]}")
    if not finite.all():
        where = steps[~finite]
        notes.append(f"{len(where)} steps without a finite loss are left out, the first is step {where[0]}")
    return notes
