"""A comparison of captures for people: a table per block on the console, an HTML page with pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from megatron_rb.comparison.numerics.comparison import NumericsComparison
from megatron_rb.comparison.numerics.distance import ULP_LABELS, PointResult
from megatron_rb.comparison.numerics.judgement import EXCESS, GROWTH, ROW_EXCESS, SYSTEMATIC, OperatorResult
from megatron_rb.comparison.page import PageSection, write_page
from megatron_rb.comparison.runs.report import finite
from megatron_rb.metrics.report import save_figure

MOST_DEFECTS = 10
MOST_NAMED = 6
HEAD = ("block", "output", "gradient", "largest", "1 ulp", "nearest to its limit")
ON_CONSOLE = (0, 1, 2, 5)
"""Columns that fit into 80 characters."""
COLUMNS = (
    "Output: relative difference of the block's output, root mean square. Gradient: that of its input's gradient. "
    "Largest: largest difference over the largest value. 1 ulp: share of values that differ by at most one unit in the "
    "last place. The operator nearest to its limit: a defect from 1 on."
)
METHOD = (
    "Every operator is computed again in fp64 from the inputs that its own side captured. Its residual is what its "
    "output deviates from that. Where the residuals of the two sides differ by more than rounding of their types "
    "explains, B's operator would not have given A's output for A's inputs: a defect. Else differences are drift, "
    f"handed on from earlier blocks. Limits: {EXCESS:g} x rounding for an operator, {ROW_EXCESS:g} x for one row, a "
    f"common factor of {SYSTEMATIC:g} round-offs for a norm. Operators that cannot be computed again and the backward "
    f"pass are judged by growth: more than {GROWTH:g} x the relative difference of what goes in."
)


def show(comparison: NumericsComparison, console: Console) -> None:
    """Print one row per block and the verdict."""
    for line in _sides(comparison):
        console.print(line, highlight=False, soft_wrap=True)
    table = Table(*(HEAD[place] for place in ON_CONSOLE))
    defective = {item.block for item in comparison.defects}
    for row in block_rows(comparison):
        table.add_row(*(row[place] for place in ON_CONSOLE), style="red" if row[0] in defective else None)
    console.print(table)
    found = [f"defect: {item}" for item in comparison.defects[:MOST_DEFECTS]]
    for line in [*found, *_not_compared(comparison), comparison.verdict]:
        console.print(line, highlight=False, soft_wrap=True)


def _not_compared(comparison: NumericsComparison) -> list[str]:
    names = comparison.one_sided
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return [f"not compared, kept by one side only: {', '.join(names[:MOST_NAMED])}{more}"] if names else []


def _sides(comparison: NumericsComparison) -> list[str]:
    named = zip("AB", (comparison.a, comparison.b), comparison.sides, strict=True)
    return [f"{side}: {name} ({about})" for side, name, about in named]


def write_report(comparison: NumericsComparison, folder: Path) -> Path:
    """Write `report.html`, its pictures and `result.json` into a folder; returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    images = [folder / "numerics.png", folder / "ulps.png"]
    _draw_growth(comparison, images[0])
    _draw_ulps(comparison, images[1])
    (folder / "result.json").write_text(json.dumps(finite(comparison.as_json()), indent=1))
    rows = block_rows(comparison)
    defective = {item.block for item in comparison.defects}
    marked = frozenset(number for number, row in enumerate(rows) if row[0] in defective)
    listed = [(str(item),) for item in comparison.defects]
    sections = [
        PageSection(lines=[*_sides(comparison), *_not_compared(comparison), METHOD]),
        PageSection("Defects, first one first", head=("",), rows=listed) if listed else PageSection("No defects"),
        PageSection("Growth of the difference, and operators against their limits", images=images[:1]),
        PageSection("Distance in units in the last place", images=images[1:]),
        PageSection("Blocks", lines=[COLUMNS], head=HEAD, rows=rows, marked=marked),
        PageSection("Points", head=("block", "point", "value", "gradient", *ULP_LABELS), rows=_points(comparison)),
    ]
    page = folder / "report.html"
    write_page(page, comparison.verdict, sections)
    return page


def block_rows(comparison: NumericsComparison) -> list[tuple[str, ...]]:
    """One row per block, in the order of the computation."""
    blocks = list(dict.fromkeys(point.block for point in comparison.points))
    return [_block_row(comparison, block) for block in blocks]


def _block_row(comparison: NumericsComparison, block: str) -> tuple[str, ...]:
    points = [point for point in comparison.points if point.block == block]
    operators = [item for item in comparison.operators if item.block == block]
    first, last = points[0], points[-1]
    nearest = max(operators, key=lambda item: math.inf if math.isnan(item.excess) else item.excess, default=None)
    numbers = (_number(last.relative), _number(first.grad_relative), _number(last.largest), _near(last))
    return (block, *numbers, "" if nearest is None else _nearest(nearest))


def _nearest(item: OperatorResult) -> str:
    way = f"{item.operator} backward" if item.backward else item.operator
    return f"{way}: {item.excess:.1e}{' DEFECT' if item.is_defect else ''}" if item.excess else ""


def _near(point: PointResult) -> str:
    return f"{sum(point.ulps[:2]) / max(1, sum(point.ulps)):.1%}"


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1e}" if value else "0"


def _points(comparison: NumericsComparison) -> list[tuple[str, ...]]:
    return [
        (point.block, point.point, _number(point.relative), _number(point.grad_relative), *map(str, point.ulps))
        for point in comparison.points
    ]


def _draw_growth(comparison: NumericsComparison, path: Path) -> None:
    from matplotlib.figure import Figure  # a second of imports that only a plot needs

    figure = Figure(figsize=(13, 8), dpi=110, layout="constrained")
    above, below = figure.subplots(2, 1)
    outputs = _last_points(comparison)
    x = np.arange(len(outputs))
    for label, values in (
        ("outputs", [point.relative for point in outputs]),
        ("gradients of outputs", [point.grad_relative for point in outputs]),
    ):
        above.plot(x, [value or math.nan for value in values], "o-", markersize=3, label=label)
    above.set(title="Relative difference of block outputs (root mean square); where there is none, no point is drawn")
    above.set(yscale="log", ylabel="relative difference")
    _name_blocks(above, [point.block for point in outputs])
    place = {point.block: number for number, point in enumerate(outputs)}
    for backward, marker, label in ((False, "o", "forward"), (True, "x", "backward")):
        chosen = [item for item in comparison.operators if item.backward is backward]
        below.plot(
            [place[item.block] for item in chosen],
            [_drawable(item) for item in chosen],
            marker,
            markersize=4,
            label=label,
        )
    below.axhline(1, color="tab:red", linestyle="--", linewidth=1, label="limit")
    below.set(title="Operators against their limits: a defect from 1 on", yscale="log", ylabel="times the limit")
    _name_blocks(below, [point.block for point in outputs])
    save_figure(figure, path)


def _last_points(comparison: NumericsComparison) -> list[PointResult]:
    """The last point of every block."""
    return list({point.block: point for point in comparison.points}.values())


def _drawable(item: OperatorResult) -> float:
    return min(max(item.excess, 1e-4), 1e8) if math.isfinite(item.excess) else 1e8


def _draw_ulps(comparison: NumericsComparison, path: Path) -> None:
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.5), dpi=110, layout="constrained")
    axis = figure.subplots()
    outputs = _last_points(comparison)
    shares = np.array([np.array(point.ulps) / max(1, sum(point.ulps)) for point in outputs])
    bottom = np.zeros(len(outputs))
    for number, label in enumerate(ULP_LABELS):
        colour = colormaps["viridis"](number / (len(ULP_LABELS) - 1))
        axis.bar(
            np.arange(len(outputs)), shares[:, number], bottom=bottom, width=1.0, color=colour, label=f"{label} ulp"
        )
        bottom += shares[:, number]
    axis.set(
        title="Outputs of blocks: distance of A and B in units in the last place of the coarser type", ylabel="share"
    )
    _name_blocks(axis, [point.block for point in outputs])
    save_figure(figure, path)


def _name_blocks(axis, names: Sequence[str]) -> None:
    every = max(1, len(names) // 24)
    axis.set_xticks(
        np.arange(len(names))[::every], [name for name in names][::every], rotation=60, ha="right", fontsize=8
    )
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
