"""A picture of the simulated pipeline: what every rank does when, vision, language and waiting apart."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from megatron_rb.planner.memory import slice_counts
from megatron_rb.planner.partition import Choices, Pipeline, durations
from megatron_rb.planner.predict import Prediction, build_pipeline
from megatron_rb.planner.schedule import Pass, simulate
from megatron_rb.planner.task import PlanTask
from megatron_rb.planner.work import LANGUAGE_PARTS, PARTS

COLOURS = {"vision": "tab:orange", "language": "tab:blue"}
MOST_LABELS = 400


def draw_timeline(task: PlanTask, item: Prediction, path: Path) -> None:
    """Write a PNG of one simulated step of one data-parallel replica, whole or not at all."""
    from matplotlib.figure import Figure  # a second of imports that only a picture needs

    pipeline = build_pipeline(task, item.degrees)
    events, vision_share, makespan = _play(pipeline, task, item)
    figure = Figure(figsize=(15, 1.6 + 0.55 * item.degrees.pp), dpi=110, layout="constrained")
    axis = figure.subplots()
    for rank, step, start, end in events:
        _draw_pass(axis, rank, step, (start, end), vision_share[step.slice_index][step.kind], len(events))
    for rank in range(item.degrees.pp):
        axis.barh(rank, makespan, height=0.8, color="0.9", zorder=0)
    axis.set(xlim=(0, makespan), xlabel="seconds", ylabel="pipeline rank", yticks=range(item.degrees.pp))
    axis.invert_yaxis()
    _legend(figure)
    axis.set_title(f"{task.pricing.mode} prediction, not a measurement: {item.degrees}; {item.layout}", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.png")
    figure.savefig(partial)
    partial.replace(path)


def _play(
    pipeline: Pipeline, task: PlanTask, item: Prediction
) -> tuple[list[tuple[int, Pass, float, float]], list[dict[str, float]], float]:
    """The passes of the first drawn step, and the share of vision in each slice's passes."""
    cuts = np.concatenate([[0], np.cumsum(item.layout.slice_lengths)])[None]
    counts = slice_counts(task.model, item.layout)[None]
    vision = np.array([[part.vision for part in item.recompute]])
    language = np.array([[part.language for part in item.recompute]])
    choices = Choices(np.ones_like(vision, dtype=bool), vision, language)
    forward, backward, transfer = (values[:, :, 0, 0] for values in durations(pipeline, cuts, counts, choices))
    events: list[tuple[int, Pass, float, float]] = []
    timing = simulate(pipeline.pp_size, pipeline.vpp_size, forward, backward, transfer, events)
    shares = []
    for slice_counts_ in counts[0]:
        seen = [part not in LANGUAGE_PARTS for part in PARTS]
        times = {"F": pipeline.forward, "B": pipeline.backward}
        parts = {kind: slice_counts_ * seconds.mean(axis=(1, 2)) for kind, seconds in times.items()}
        shares.append({kind: float(values[seen].sum() / max(values.sum(), 1e-12)) for kind, values in parts.items()})
    return events, shares, float(timing.makespan)


def _draw_pass(axis, rank: int, step: Pass, span: tuple[float, float], vision: float, count: int) -> None:
    start, end = span
    width = end - start
    # Backward passes go through the language model first.
    order = [("vision", vision), ("language", 1 - vision)]
    left = start
    for name, share in order if step.kind == "F" else reversed(order):
        alpha = 1.0 if step.kind == "F" else 0.6
        axis.barh(rank, width * share, left=left, height=0.8, color=COLOURS[name], alpha=alpha, linewidth=0)
        left += width * share
    axis.barh(rank, width, left=start, height=0.8, fill=False, edgecolor="white", linewidth=0.6)
    if count <= MOST_LABELS:
        axis.text(start + width / 2, rank, str(step.micro_batch), ha="center", va="center", fontsize=6, color="white")


def _legend(figure) -> None:
    from matplotlib.patches import Patch

    patches = [
        Patch(color=colour, alpha=alpha, label=f"{name}, {direction}")
        for name, colour in COLOURS.items()
        for direction, alpha in (("forward", 1.0), ("backward", 0.6))
    ]
    figure.legend(handles=[*patches, Patch(color="0.9", label="bubble")], ncols=5, loc="outside lower center")
