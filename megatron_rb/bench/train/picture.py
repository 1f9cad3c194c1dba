"""A result as a picture: steps, sections of every stage, passes over time, micro-batches."""

from __future__ import annotations

import numpy as np

from megatron_rb.bench.train.result import SECTIONS, Result
from megatron_rb.metrics.timeline import pass_seconds

COLOURS = dict(
    zip(
        SECTIONS,
        (
            "tab:red",
            "tab:orange",
            "tab:blue",
            "lightsteelblue",
            "tab:green",
            "lightgray",
            "tab:purple",
            "black",
        ),
        strict=True,
    )
)
MOST_ROWS = 16
"""Ranks that are drawn; of more, the first."""


def draw(result: Result):
    """The figure, not saved."""
    from matplotlib.figure import Figure  # a second of imports that only a plot needs

    figure = Figure(figsize=(13, 8), dpi=110, layout="constrained")
    axes = figure.subplots(2, 2)
    _draw_steps(axes[0, 0], result)
    _draw_sections(axes[0, 1], result)
    _draw_timeline(axes[1, 0], result)
    _draw_micro_batches(axes[1, 1], result)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
        axis.set_axisbelow(True)
    device = f"{result.devices} x {result.device.get('device', '')} ({result.device['platform']})"
    figure.suptitle(f"{result.model['name']}, mix {result.mix['name']}, {device}, {result.date}", fontsize=12)
    return figure


def _draw_steps(axis, result: Result) -> None:
    numbers = np.arange(1, len(result.steps) + 1)
    seconds = np.array([step.seconds for step in result.steps])
    waits = np.array([step.data_wait_seconds for step in result.steps])
    axis.bar(numbers, seconds, color="tab:blue", label="step")
    axis.bar(numbers, waits, color="tab:red", label="waiting for data")
    axis.axhline(float(np.median(seconds)), color="black", linewidth=1, linestyle="--", label="median")
    axis.set(title="Timed steps", xlabel="step", ylabel="seconds")
    axis.set_ylim(0, 1.2 * float(seconds.max()))  # room for the legend
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(frameon=False, fontsize=8, ncols=3, loc="upper right")


def _draw_sections(axis, result: Result) -> None:
    ranks = result.ranks[:MOST_ROWS]
    left = np.zeros(len(ranks))
    for name in SECTIONS:
        # Differences of clocks can be a little below nothing.
        values = np.maximum([rank.sections[name] for rank in ranks], 0.0)
        axis.barh(np.arange(len(ranks)), values, left=left, color=COLOURS[name], label=name)
        left += values
    axis.set_yticks(range(len(ranks)), [f"rank {rank.rank}\nstage {rank.pp_rank}" for rank in ranks], fontsize=8)
    axis.invert_yaxis()
    axis.set(title="Sections of a traced step", xlabel="seconds")
    axis.legend(frameon=False, fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.14))


def _draw_timeline(axis, result: Result) -> None:
    stages = result.timeline[:MOST_ROWS]
    start = min((span.start for stage in stages for span in stage.spans), default=0.0)
    colours = {"forward": "tab:blue", "backward": "tab:green"}
    for row, stage in enumerate(stages):
        axis.barh(row, pass_seconds(stages), color="whitesmoke", height=0.7)
        for kind, colour in colours.items():
            spans = [(span.start - start, span.seconds) for span in stage.spans if span.kind == kind]
            axis.broken_barh(spans, (row - 0.35, 0.7), facecolors=colour, edgecolor="white", linewidth=0.5)
    for kind, colour in colours.items():
        axis.plot([], [], color=colour, linewidth=6, label=kind)
    axis.plot([], [], color="whitesmoke", linewidth=6, label="bubble")
    bubbles = {rank.rank: rank.bubble for rank in result.ranks}
    labels = [f"stage {stage.pp_rank}\n{bubbles[stage.rank]:.0%} bubble" for stage in stages]
    axis.set_yticks(range(len(stages)), labels, fontsize=8)
    axis.invert_yaxis()
    axis.set(title="Passes of one traced step", xlabel="seconds")
    axis.legend(frameon=False, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.14))


def _draw_micro_batches(axis, result: Result) -> None:
    loads = np.array(result.loads).reshape(-1, 2)
    axis.scatter(loads[:, 0], loads[:, 1], color="tab:blue", s=24)
    tokens, patches = result.mix["seq_length"], result.mix["max_patches"]
    axis.axvline(tokens, color="tab:red", linewidth=1, label="token budget")
    if loads[:, 1].max(initial=0) > 0.5 * patches:
        axis.axhline(patches, color="tab:orange", linewidth=1, label="patch budget")
    axis.set(title="Micro-batches of the first timed step", xlabel="tokens", ylabel="patches")
    axis.set_xlim(0, 1.05 * tokens)
    axis.set_ylim(0, 1.2 * max(int(loads[:, 1].max(initial=0)), 1))
    axis.legend(frameon=False, fontsize=8, loc="lower left")
