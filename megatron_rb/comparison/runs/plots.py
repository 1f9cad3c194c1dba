"""Pictures of a comparison of runs: the loss curves, the gap over time, norms and rates."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_rb.comparison.runs.comparison import RunComparison
from megatron_rb.metrics.report import reach_of, save_figure, smoothed

LINES = (("tab:blue", 3.2), ("tab:orange", 1.3))
"""Colour and width of A and of B, which is drawn over A: where they are one, A shows on both sides of it."""


def draw_curves(comparison: RunComparison, path: Path) -> None:
    """Both loss curves, raw and smoothed; the window that counts as the end is shaded, and drawn large beside it."""
    from matplotlib.figure import Figure  # a second of imports that only a plot needs

    figure = Figure(figsize=(13, 5.5), dpi=110, layout="constrained")
    whole, end = figure.subplots(1, 2, width_ratios=(2, 1))
    first, last = _end(comparison)
    reach = 0
    for run, (colour, width) in zip((comparison.a, comparison.b), LINES, strict=True):
        x, loss = run.column("step"), run.column("loss")
        reach = reach_of(len(loss))
        smooth, inside = smoothed(loss), (x >= first) & (x <= last)
        for axis, shown in ((whole, slice(None)), (end, inside)):
            axis.plot(x[shown], loss[shown], color=colour, linewidth=0.6, alpha=0.4)
            axis.plot(x[shown], smooth[shown], color=colour, linewidth=width, label=run.name)
    whole.axvspan(first, last, color="tab:gray", alpha=0.12, label=f"last {comparison.window} steps")
    whole.set(title=f"Loss; thin: every step, thick: mean of {reach} steps to either side, falling off linearly")
    whole.set(xlabel="optimizer step", ylabel="cross entropy per label [nats]")
    end.set(title=f"Its last {comparison.window} steps", xlabel="optimizer step")
    _finish(figure, [whole, end], path)


def draw_gap(comparison: RunComparison, path: Path) -> None:
    """The gap of windows along the runs with its 95 % interval, and the threshold."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.5), dpi=110, layout="constrained")
    axis = figure.subplots()
    x = [step for step, _ in comparison.over_time]
    percent = np.array([gap.percent for _, gap in comparison.over_time])
    margin = np.array([gap.margin for _, gap in comparison.over_time])
    shown = np.isfinite(margin)
    axis.plot(x, percent, "o-", markersize=3, color="tab:purple", label=f"gap of {comparison.window} steps")
    axis.fill_between(
        np.array(x)[shown],
        (percent - margin)[shown],
        (percent + margin)[shown],
        color="tab:purple",
        alpha=0.2,
        label="95 % interval",
    )
    for sign in (-1, 1):
        label = f"threshold {comparison.threshold:g} %" if sign > 0 else None
        axis.axhline(sign * comparison.threshold, color="tab:red", linestyle="--", linewidth=1, label=label)
    axis.set(title="Gap of B against A over time", xlabel="last step of the window", ylabel="percent")
    _finish(figure, [axis], path)


def draw_agreement(comparison: RunComparison, path: Path) -> None:
    """Gradient norms, learning rates of the language model and tokens per second of both runs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), dpi=110, layout="constrained")
    axes = figure.subplots(1, 3)
    for run, (colour, width) in zip((comparison.a, comparison.b), LINES, strict=True):
        x = run.column("step")
        rates = [float(entry["learning_rates"].get("language", "nan")) for entry in run.steps]
        norm = run.column("grad_norm")
        axes[0].plot(x, norm, color=colour, linewidth=0.6, alpha=0.3)
        axes[0].plot(x, smoothed(norm), color=colour, linewidth=width, label=run.name)
        axes[1].plot(x, rates, color=colour, linewidth=width, label=run.name)
        axes[2].plot(x, smoothed(run.column("tokens_per_second")), color=colour, linewidth=width, label=run.name)
    for axis, title in zip(axes, ("Gradient norm", "Learning rate (language)", "Tokens per second"), strict=True):
        axis.set(title=title, xlabel="optimizer step")
    _finish(figure, axes, path)


def _end(comparison: RunComparison) -> tuple[float, float]:
    return float(comparison.steps[-comparison.window]), float(comparison.steps[-1])


def _finish(figure, axes, path: Path) -> None:
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=9, loc="outside lower center", ncols=len(labels))
    save_figure(figure, path)
