"""A comparison of runs for people: on the console, and as an HTML page with pictures."""

from __future__ import annotations

import json
import math
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_rb.comparison.page import PageSection, write_page
from megatron_rb.comparison.runs.comparison import Beside, RunComparison
from megatron_rb.comparison.runs.gap import Verdict
from megatron_rb.comparison.runs.plots import draw_agreement, draw_curves, draw_gap

EXIT_CODES = {Verdict.AGREE: 0, Verdict.DIFFER: 1, Verdict.TOO_NOISY: 3}
DEFINITION = (
    "gap = 100 % x (mean loss of B - mean loss of A) / mean loss of A over the same last steps of both runs; its 95 % "
    "interval comes from the step-by-step differences of these steps and allows for neighbours that are alike. Agree: "
    "the interval lies within the threshold. Differ: it lies outside. Else the curves are too noisy to tell."
)


def headline(comparison: RunComparison) -> str:
    """The verdict in one line."""
    gap = comparison.final
    said = f"final gap {gap.percent:+.3f} % +- {gap.margin:.3f} %" if math.isfinite(gap.percent) else "no final gap"
    return f"{comparison.verdict}: {said} over the last {gap.steps} steps; {comparison.reason}"


def show(comparison: RunComparison, console: Console) -> None:
    """Print the comparison."""
    console.print(f"A {comparison.a.name}   B {comparison.b.name}", highlight=False)
    table = Table("", "A", "B", "B / A")
    for row in _rows(comparison):
        table.add_row(*row)
    console.print(table)
    for line in [*comparison.agreement, *comparison.notes, headline(comparison)]:
        console.print(line, highlight=False, soft_wrap=True)


def write_report(comparison: RunComparison, folder: Path) -> Path:
    """Write `report.html`, its pictures and `result.json` into a folder; returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    images = [folder / name for name in ("loss.png", "gap.png", "agreement.png")]
    draw_curves(comparison, images[0])
    draw_gap(comparison, images[1])
    draw_agreement(comparison, images[2])
    (folder / "result.json").write_text(json.dumps(finite(comparison.as_json()), indent=1))
    sections = [
        PageSection(lines=[f"A {comparison.a.name}, B {comparison.b.name}", headline(comparison), DEFINITION]),
        PageSection("Loss", images=images[:1]),
        PageSection("Gap over time", images=images[1:2]),
        PageSection("Agreement", lines=comparison.agreement, images=images[2:]),
        PageSection("Side by side", head=("", "A", "B", "B / A"), rows=_rows(comparison)),
        PageSection("Notes", lines=comparison.notes or ["none"]),
    ]
    page = folder / "report.html"
    write_page(page, f"{comparison.a.name} and {comparison.b.name}: {comparison.verdict}", sections)
    return page


def finite(value):
    """The same JSON with what is not a number as null: JSON has no NaN and no infinity."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _rows(comparison: RunComparison) -> list[tuple[str, str, str, str]]:
    evaluated = [(f"{row.name} at step {step}", row) for step, row in comparison.evaluations]
    return [_row(name, row) for name, row in [*((row.name, row) for row in comparison.throughput), *evaluated]]


def _row(name: str, row: Beside) -> tuple[str, str, str, str]:
    return name, f"{row.a:,.4g} {row.unit}".strip(), f"{row.b:,.4g} {row.unit}".strip(), f"{row.ratio:.3f}"
