"""Two captures of one step compared point by point: where do they part, and is it rounding or a defect?

Forward, an operator is at fault when the residuals of the two sides against its fp64 definition (see `operators`)
differ by more than rounding of their types explains: then B's operator would not have given A's output for A's inputs.
What has merely drifted has sound residuals on both sides. An operator that cannot be computed again, and the backward
pass, are judged by growth: the relative difference of what comes out against that of what went in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_rb.capture.points import block_names, points_of
from megatron_rb.comparison.numerics.captures import Capture, check_same_input
from megatron_rb.comparison.numerics.definitions import BlockView
from megatron_rb.comparison.numerics.distance import ULP_LABELS, PointResult, measure
from megatron_rb.comparison.numerics.judgement import Carried, OperatorResult, judge_backward, judge_forward


@dataclass(frozen=True)
class NumericsComparison:
    """The whole comparison, in the order of the computation."""

    a: str
    b: str
    sides: tuple[str, str]
    """Where and how each was captured."""
    points: list[PointResult]
    operators: list[OperatorResult]
    one_sided: list[str]
    """What only one side kept, so that it is not compared."""

    @property
    def defects(self) -> list[OperatorResult]:
        """Forward ones in the order of the computation, then backward ones in the order of the backward pass."""
        found = [item for item in self.operators if item.is_defect]
        return [item for item in found if not item.backward] + [item for item in found if item.backward]

    @property
    def identical(self) -> bool:
        return all(point.relative == 0 and not point.grad_relative > 0 for point in self.points)

    @property
    def verdict(self) -> str:
        """One line: identical, drift, or the first defect."""
        if self.defects:
            more = f" ({len(self.defects)} operators in all)" if len(self.defects) > 1 else ""
            return f"defect in {self.defects[0]}{more}"
        if self.identical:
            return "identical: every kept value and gradient is the same"
        last = self.points[-1]
        return (
            f"drift: every operator is within rounding; outputs differ by {last.relative:.2e} at the end of the model"
        )

    def as_json(self) -> dict[str, Any]:
        """For a script."""
        return {
            "a": self.a,
            "b": self.b,
            "sides": self.sides,
            "verdict": self.verdict,
            "identical": self.identical,
            "defects": [asdict(item) for item in self.defects],
            "one_sided": self.one_sided,
            "ulp_labels": ULP_LABELS,
            "points": [asdict(item) for item in self.points],
            "operators": [asdict(item) for item in self.operators],
        }


def compare_captures(
    a: Capture, b: Capture, track: Callable[[Sequence[str]], Iterable[str]] = iter
) -> NumericsComparison:
    """Compare B with A.

    Args:
        track: wraps the list of blocks, e.g. to show progress.

    Raises:
        ValueError: the captures are of different models, batches or weights, or incomplete.
    """
    check_same_input(a, b)
    model = a.description["model"]
    deepstack = tuple(sorted(model["vision"]["deepstack_layers"]))
    names = block_names(model["vision"]["num_layers"], deepstack, model["text"]["num_layers"])
    points: list[PointResult] = []
    operators: list[OperatorResult] = []
    carried = Carried()
    for block in track(names):
        views = [(BlockView(a, sample, block), BlockView(b, sample, block)) for sample in range(len(a.sample_names))]
        here = [result for point in points_of(block) if (result := measure(views, block, point)) is not None]
        points += here
        operators += judge_forward(views, block, here, carried)
    operators += judge_backward(points, max(carried.roundoff, 2.0**-24))
    return NumericsComparison(a.name, b.name, (a.about, b.about), points, operators, _one_sided(a, b))


def _one_sided(a: Capture, b: Capture) -> list[str]:
    """Sorted, each as `gradient of norm in language.head (only A)`."""
    kept = [{name for name in side.names() if not name.startswith("weight/")} for side in (a, b)]
    found = set()
    for side, names in (("A", kept[0] - kept[1]), ("B", kept[1] - kept[0])):
        for name in names:
            what, _, block, point = name.split("/")
            found.add(f"{'gradient of ' if what == 'grad' else ''}{point} in {block} (only {side})")
    return sorted(found)
