"""The curves of a run as one picture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rb.metrics.jsonl import read_metrics

Entries = Sequence[dict[str, Any]]

MODULE_COLOURS = {"vision": "tab:orange", "merger": "tab:green", "language": "tab:blue"}


def plot_curves(jsonl_path: str | Path, png_path: str | Path) -> None:
    """Draw loss, learning rates, gradient norm, throughput and data wait of a `metrics.jsonl` into a PNG.

    The picture appears whole or not at all, so it can be drawn while a run goes on and while someone looks at it.

    Raises:
        ValueError: the file holds no steps.
    """
    steps, evaluations = read_metrics(jsonl_path)
    if not steps:
        raise ValueError(f"{jsonl_path} holds no steps yet; there is nothing to plot")
    save_figure(_draw(steps, evaluations), Path(png_path))


def _draw(steps: Entries, evaluations: Entries):
    from matplotlib.figure import Figure  # a second of imports that only a plot needs

    figure = Figure(figsize=(13, 9), dpi=110, layout="constrained")
    axes = figure.subplots(3, 2)
    x = np.array([entry["step"] for entry in steps])
    _draw_loss(axes[0, 0], x, steps, evaluations)
    _draw_learning_rates(axes[0, 1], x, steps)
    _draw_grad_norm(axes[1, 0], x, steps)
    _draw_evaluations(axes[1, 1], evaluations, (x[0], x[-1]))
    _draw_throughput(axes[2, 0], x, steps)
    _draw_times(axes[2, 1], x, steps)
    for axis in axes.flat:
        _tidy(axis, x)
    samples = sum(entry["num_samples"] for entry in steps)
    tokens = sum(entry["num_tokens"] for entry in steps)
    figure.suptitle(f"{len(steps):,} steps, {samples:,} samples, {tokens:,} tokens", fontsize=12)
    return figure


def _draw_loss(axis, x: np.ndarray, steps: Entries, evaluations: Entries) -> None:
    axis.set(title="Loss", ylabel="cross entropy per label [nats]")
    values = column(steps, "loss")
    _raw_and_smoothed(axis, x, values, "tab:blue", "training")
    marked = [(entry["step"], float(entry["values"]["loss"])) for entry in evaluations if "loss" in entry["values"]]
    if marked:
        axis.plot(*zip(*marked, strict=True), "D", color="tab:red", markersize=5, label="evaluation", zorder=3)
    missing = x[~np.isfinite(values)]
    if len(missing):
        height = np.zeros(len(missing))
        where = axis.get_xaxis_transform()
        label = f"no finite loss ({len(missing)})"
        axis.plot(missing, height, "x", color="black", transform=where, clip_on=False, label=label)


def _draw_learning_rates(axis, x: np.ndarray, steps: Entries) -> None:
    axis.set(title="Learning rate", ylabel="learning rate")
    curves: dict[tuple[float, ...], list[str]] = {}
    for module in steps[-1]["learning_rates"]:
        curve = tuple(float(entry["learning_rates"].get(module, "nan")) for entry in steps)
        curves.setdefault(curve, []).append(module)
    for curve, modules in curves.items():
        axis.plot(x, curve, color=MODULE_COLOURS.get(modules[-1]), linewidth=1.7, label=", ".join(modules), **_dot(x))
    axis.set_ylim(bottom=0)
    axis.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))


def _draw_grad_norm(axis, x: np.ndarray, steps: Entries) -> None:
    axis.set(title="Gradient norm", ylabel="global norm before clipping")
    values = column(steps, "grad_norm")
    _raw_and_smoothed(axis, x, values, "tab:purple", "gradient norm")
    known = values[np.isfinite(values)]
    if len(known) and known.min() > 0 and known.max() > 20 * known.min():
        axis.set_yscale("log")


def _draw_evaluations(axis, evaluations: Entries, span: tuple[int, int]) -> None:
    axis.set(title="Evaluation", ylabel="value")
    if not evaluations:
        axis.text(0.5, 0.5, "no evaluation yet", transform=axis.transAxes, ha="center", color="tab:gray")
        axis.set_yticks([])
        axis.set_xlim(*_margin(span))
    for name in dict.fromkeys(name for entry in evaluations for name in entry["values"]):
        points = [(entry["step"], float(entry["values"][name])) for entry in evaluations if name in entry["values"]]
        axis.plot(*zip(*points, strict=True), "D-", markersize=5, linewidth=1.2, label=name)


def _draw_throughput(axis, x: np.ndarray, steps: Entries) -> None:
    axis.set(title="Throughput", ylabel="thousands per second")
    for name, colour, label in (
        ("tokens_per_second", "tab:blue", "tokens"),
        ("patches_per_second", "tab:orange", "vision patches"),
    ):
        _raw_and_smoothed(axis, x, column(steps, name) / 1000, colour, label)
    axis.set_ylim(bottom=0)


def _draw_times(axis, x: np.ndarray, steps: Entries) -> None:
    axis.set(title="Time of a step", ylabel="seconds")
    total, wait = column(steps, "seconds"), column(steps, "data_wait_seconds")
    _raw_and_smoothed(axis, x, total, "tab:blue", "whole step")
    share = np.nansum(wait) / max(np.nansum(total), 1e-12)
    axis.fill_between(x, wait, color="tab:red", alpha=0.5, linewidth=0, label=f"waiting for data ({share:.1%})")
    # The first step also sets things up; it must not flatten the others.
    later = total[1:] if len(total) > 4 else total
    axis.set_ylim(0, 1.25 * max(float(np.nanmax(later)), 1e-9))


def _raw_and_smoothed(axis, x: np.ndarray, values: np.ndarray, colour: str, label: str) -> None:
    if len(x) < 20:
        axis.plot(x, values, color=colour, linewidth=1.5, label=label, **_dot(x))
        return
    axis.plot(x, values, color=colour, linewidth=0.7, alpha=0.3)
    axis.plot(x, smoothed(values), color=colour, linewidth=1.7, label=label)


def _dot(x: np.ndarray) -> dict[str, Any]:
    return {"marker": "o", "markersize": 3.5} if len(x) < 20 else {}


def _tidy(axis, x: np.ndarray) -> None:
    axis.set_xlabel("optimizer step")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlim(*_margin((x[0], x[-1])))
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, fontsize=9)


def _margin(span: tuple[int, int]) -> tuple[float, float]:
    gap = max(0.5, 0.02 * (span[1] - span[0]))
    return span[0] - gap, span[1] + gap


def column(entries: Entries, name: str) -> np.ndarray:
    """One number of every entry as float64; what is absent becomes NaN."""
    return np.array([float("nan" if entry[name] is None else entry[name]) for entry in entries])


def reach_of(count: int) -> int:
    """Points to either side that `smoothed` averages over on a curve of so many points."""
    return max(1, count // 30)


def smoothed(values: np.ndarray) -> np.ndarray:
    """Mean of the neighbourhood, about a thirtieth of the curve to either side, with weights that fall off linearly.

    Neighbours that are not finite, or lie past an end, have no weight.
    """
    reach = reach_of(len(values))
    kernel = 1 + reach - np.abs(np.arange(-reach, reach + 1))
    finite = np.isfinite(values)
    # `full` and a cut instead of `same`, whose length is that of the kernel for short curves.
    total = np.convolve(np.where(finite, values, 0.0), kernel)[reach : reach + len(values)]
    weight = np.convolve(finite.astype(float), kernel)[reach : reach + len(values)]
    return np.divide(total, weight, out=np.full(len(values), np.nan), where=weight > 0)


def save_figure(figure, path: Path) -> None:
    """Write a PNG whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".tmp")
    figure.savefig(fresh, format="png")
    os.replace(fresh, path)
