"""Two captures of one step compared point by point: where do they part, and is it rounding or a defect?

Forward, an operator is at fault when the residuals of the two sides against its fp64 definition (see `operators`)
differ by more than rounding of their types explains: then B's operator would not have given A's output for A's inputs.
What has merely drifted has sound residuals on both sides. An operator that cannot be computed again, and the backward
pass, are judged by growth: the relative difference of what comes out against that of what went in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from megatron_rb.evaluation.compare.captures import Capture, Table, check_same_input, common_rows
from megatron_rb.evaluation.compare.operators import BlockView, Operator, Residual, operators_of
from megatron_rb.train.capture.points import Point, block_names, points_of

EXCESS = 2.0
"""Root mean square of the difference of residuals over that of rounding, of an operator, from which it is a defect.
Sound operators of tiny models in fp32 and bf16 stay below 0.6, their rows below 0.8."""
ROW_EXCESS = 3.5
"""The same for a single row."""
GROWTH = 16.0
"""Growth of the relative difference through one operator from which it is a defect."""
SYSTEMATIC = 3.0
"""Factor common to all values of a norm, in units of round-off, from which it is a defect."""
ULP_EDGES = (0.5, 1.5, 4.5, 16.5, 256.5)
ULP_LABELS = ("0", "1", "2-4", "5-16", "17-256", "more")


@dataclass(frozen=True)
class PointResult:
    """Outputs and gradients of one point on both sides."""

    block: str
    point: str
    relative: float
    """Root mean square of the difference over that of A."""
    grad_relative: float
    """NaN where no gradient was kept."""
    largest: float
    """Largest absolute difference over the largest absolute value of A."""
    ulps: tuple[int, ...]
    """Values by their distance in units in the last place of the coarser type; see ULP_LABELS."""


@dataclass(frozen=True)
class OperatorResult:
    """What is said about one operator of one block."""

    block: str
    operator: str
    backward: bool
    by_definition: bool
    """Judged by its fp64 definition; else by growth."""
    excess: float
    """Times what rounding explains; a defect from 1 on."""
    deviation: float
    """Difference of the residuals (judged by growth: of the outputs) over the output, root mean squares: its size tells
    what happened, e.g. 3e-3 that bf16 was used, 3e-4 TF32."""
    side: str
    """Which side leaves the definition: `A`, `B`, `A and B`, or empty."""

    @property
    def is_defect(self) -> bool:
        return not self.excess < 1

    def __str__(self) -> str:
        way = "backward pass of " if self.backward else ""
        side = f" on side {self.side}" if self.side else ""
        sizes = f"{self.excess:.3g} x the limit, {self.deviation:.1e} of its output"
        said = sizes if math.isfinite(self.excess) else "values that are not finite"
        return f"{self.block}: {way}{self.operator}{side} ({said})"


@dataclass(frozen=True)
class NumericsComparison:
    """The whole comparison, in the order of the computation."""

    a: str
    b: str
    dtypes: tuple[str, str]
    points: list[PointResult]
    operators: list[OperatorResult]

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
            "a": self.a, "b": self.b, "dtypes": self.dtypes, "verdict": self.verdict, "identical": self.identical,
            "defects": [asdict(item) for item in self.defects], "ulp_labels": ULP_LABELS,
            "points": [asdict(item) for item in self.points], "operators": [asdict(item) for item in self.operators],
        }  # fmt: skip


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
    taps = tuple(sorted(model["vision"]["deepstack_layers"]))
    names = block_names(model["vision"]["num_layers"], taps, model["text"]["num_layers"])
    points: list[PointResult] = []
    operators: list[OperatorResult] = []
    carried = _Carried()
    for block in track(names):
        views = [(BlockView(a, sample, block), BlockView(b, sample, block)) for sample in range(len(a.sample_names))]
        here = [result for point in points_of(block) if (result := _point(views, block, point)) is not None]
        points += here
        operators += _forward(views, block, here, carried)
    dtypes = (a.description["dtype"], b.description["dtype"])
    operators += _backward(points, max(carried.roundoff, 2.0**-24))
    return NumericsComparison(a.name, b.name, dtypes, points, operators)


Views = Sequence[tuple[BlockView, BlockView]]


def _point(views: Views, block: str, point: Point) -> PointResult | None:
    values = _Distance.over(_pairs(views, lambda view: view.point(point.name)), with_ulps=True)
    if values is None:
        return None
    grads = _Distance.over(_pairs(views, lambda view: view.grad(point.name)), with_ulps=False)
    return PointResult(
        block, point.name, values.relative, grads.relative if grads else math.nan, values.largest,
        tuple(values.ulps.tolist()),
    )  # fmt: skip


def _pairs(views: Views, read: Callable[[BlockView], Table | None]) -> Iterator[tuple[Table, Table]]:
    """What both sides kept of each sample, in the same rows."""
    for view_a, view_b in views:
        a, b = read(view_a), read(view_b)
        if a is not None and b is not None:
            rows = common_rows([a, b])
            yield a.at(rows), b.at(rows)


@dataclass
class _Distance:
    """Sums over the samples of one point."""

    squares: float = 0.0
    of_a: float = 0.0
    most: float = 0.0
    scale: float = 0.0
    ulps: np.ndarray = field(default_factory=lambda: np.zeros(len(ULP_LABELS), dtype=np.int64))

    @classmethod
    def over(cls, pairs: Iterable[tuple[Table, Table]], with_ulps: bool) -> _Distance | None:
        """None when nothing was kept."""
        total, empty = cls(), True
        for a, b in pairs:
            total._add(a.values, b.values, max(a.roundoff, b.roundoff) if with_ulps else 0.0)
            empty = False
        return None if empty else total

    @property
    def relative(self) -> float:
        """Root mean square of the difference over that of A; infinite for values that are not finite."""
        if not math.isfinite(self.squares):
            return math.inf
        return math.sqrt(self.squares / self.of_a) if self.of_a else (math.inf if self.squares else 0.0)

    @property
    def largest(self) -> float:
        return self.most / self.scale if self.scale else 0.0

    def _add(self, a: np.ndarray, b: np.ndarray, roundoff: float) -> None:
        difference = np.abs(a - b)
        self.squares += float(np.vdot(difference, difference))
        self.of_a += float(np.vdot(a, a))
        self.most = max(self.most, float(difference.max(initial=0)))
        self.scale = max(self.scale, float(np.abs(a).max(initial=0)))
        if roundoff:
            self.ulps += ulp_counts(a, b, difference, roundoff)


def ulp_counts(a: np.ndarray, b: np.ndarray, difference: np.ndarray, roundoff: float) -> np.ndarray:
    """Values by their distance in units in the last place; see ULP_LABELS. What is no number counts as far apart.

    Args:
        difference: absolute difference of a and b.
        roundoff: of the type whose units are counted.
    """
    if not difference.any():
        return np.array([difference.size] + [0] * (len(ULP_LABELS) - 1))
    largest = np.maximum(np.abs(a), np.abs(b))
    # The unit of a value is 2 ** floor(log2) times twice the round-off: its exponent bits alone.
    unit = (largest.view(np.int64) & np.int64(0x7FF0_0000_0000_0000)).view(np.float64) * (2 * roundoff)
    below = [int(np.count_nonzero(difference <= edge * unit)) for edge in ULP_EDGES]
    return np.diff([0, *below, difference.size])


@dataclass
class _Carried:
    """What the walk over the blocks remembers."""

    relative: float = 0.0
    """Largest relative difference seen so far."""
    roundoff: float = 0.0


def _forward(views: Views, block: str, points: list[PointResult], carried: _Carried) -> list[OperatorResult]:
    relative = {point.point: point.relative for point in points}
    for view_a, view_b in views:
        for view in (view_a, view_b):
            output = view.point("output")
            carried.roundoff = max(carried.roundoff, output.roundoff if output is not None else 0.0)
    results = []
    for operator in operators_of(block):
        judged = _by_definition(views, block, operator) or _by_growth(block, operator, relative, carried)
        if judged is not None:
            results.append(judged)
    carried.relative = max([carried.relative, *(value for value in relative.values() if math.isfinite(value))])
    return results


def _by_definition(views: Views, block: str, operator: Operator) -> OperatorResult | None:
    """None when the operator was not kept well enough on either side of every sample."""
    if operator.residual is None:
        return None
    judged = []
    for view_a, view_b in views:
        a, b = operator.residual(view_a), operator.residual(view_b)
        if a is not None and b is not None and a.values.shape == b.values.shape:
            both = Residual(
                a.values - b.values, np.hypot(a.sigma, b.sigma), a.rows, a.wanted, max(a.roundoff, b.roundoff)
            )
            judged.append((_excess(both), _excess(a), _excess(b), _share(both.values, view_a, operator)))
    if not judged:
        return None
    excess, own_a, own_b, deviation = max(judged, key=lambda item: item[0])
    blamed = " and ".join(name for name, own in (("A", own_a), ("B", own_b)) if not own < 1)
    return OperatorResult(block, operator.name, False, True, excess, deviation, blamed if not excess < 1 else "")


def _share(values: np.ndarray, view: BlockView, operator: Operator) -> float:
    """Root mean square of the values over that of the operator's output."""
    output = view.point(operator.outputs[0])
    size = float(np.square(output.values).mean()) if output is not None else 0.0
    return math.sqrt(float(np.square(values).mean()) / size) if size else 0.0


def _excess(residual: Residual) -> float:
    """How far the residual exceeds its limit; 1 is at the limit."""
    if not np.isfinite(residual.values).all():
        return math.inf
    if not residual.values.any():
        return 0.0
    squares = np.square(residual.values).mean(1)
    rounding = np.maximum(np.square(residual.sigma).mean(1), 1e-300)
    whole = math.sqrt(squares.mean() / rounding.mean())
    row = math.sqrt(float((squares / rounding).max()))
    return max(whole / EXCESS, row / ROW_EXCESS, _common_factor(residual) / SYSTEMATIC)


def _common_factor(residual: Residual) -> float:
    """Relative deviation that all values share, in units of round-off; 0 where it is not looked for."""
    if residual.wanted is None or not residual.wanted.any():
        return 0.0
    shared = float((residual.values * residual.wanted).sum() / np.square(residual.wanted).sum())
    return abs(shared) / residual.roundoff


def _by_growth(block: str, operator: Operator, relative: dict[str, float], carried: _Carried) -> OperatorResult | None:
    """For what cannot be computed again: outputs may differ by `GROWTH` times what the inputs do."""
    outputs = [relative[name] for name in operator.outputs if name in relative]
    if not outputs:
        return None
    known = [relative[name] for name in operator.inputs if name in relative]
    # Without kept inputs in the block: patch embedding (the pixels are equal) and embedding (the merger's output).
    before = max(known, default=carried.relative)
    limit = GROWTH * max(before, carried.roundoff)
    return OperatorResult(block, operator.name, False, False, max(outputs) / limit, max(outputs), "")


CONSUMER = {
    "norm1": "qkv", "qkv": "rotary", "q": "attention", "k": "attention", "v": "attention", "attention": "proj",
    "proj": "add 1", "residual": "norm2", "norm2": "fc1", "fc1": "activation", "activation": "fc2", "fc2": "add 2",
    "input": "norm1", "norm": "fc1",
}  # fmt: skip
"""The operator whose backward pass gives the gradient of a point."""


def _backward(points: Sequence[PointResult], roundoff: float) -> list[OperatorResult]:
    """Walk from the head to the pixels: a gradient may differ by `GROWTH` times what its block and those before do."""
    results, before = [], 0.0
    for point in reversed(points):
        if math.isnan(point.grad_relative):
            continue
        here = max((other.relative for other in points if other.block == point.block), default=0.0)
        limit = GROWTH * max(before, here, roundoff)
        name = CONSUMER.get(point.point, "")
        if point.block == "language.head":
            name = "loss" if point.point == "norm" else "norm"
        if name:
            excess = point.grad_relative / limit
            results.append(OperatorResult(point.block, name, True, False, excess, point.grad_relative, ""))
        before = max(before, point.grad_relative)
    return results
