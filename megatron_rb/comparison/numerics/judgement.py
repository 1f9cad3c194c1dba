"""Is an operator at fault? Against its fp64 definition, or by how much the difference grows in it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_rb.comparison.numerics.definitions import BlockView, Residual
from megatron_rb.comparison.numerics.distance import PointResult, Views
from megatron_rb.comparison.numerics.operators import Operator, operators_of

EXCESS = 2.0
"""Root mean square of the difference of residuals over that of rounding, of an operator, from which it is a defect.
Sound operators of tiny models in fp32 and bf16 stay below 0.6, their rows below 0.8."""
ROW_EXCESS = 3.5
"""The same for a single row."""
GROWTH = 16.0
"""Growth of the relative difference through one operator from which it is a defect."""
SYSTEMATIC = 3.0
"""Factor common to all values of a norm, in units of round-off, from which it is a defect."""


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


@dataclass
class Carried:
    """What the walk over the blocks remembers."""

    relative: float = 0.0
    """Largest relative difference seen so far."""
    roundoff: float = 0.0


def judge_forward(views: Views, block: str, points: list[PointResult], carried: Carried) -> list[OperatorResult]:
    """The operators of a block in their order; `carried` learns from the block."""
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
        if a is not None and b is not None and np.array_equal(a.rows, b.rows):
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


def _by_growth(block: str, operator: Operator, relative: dict[str, float], carried: Carried) -> OperatorResult | None:
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
    "norm1": "qkv",
    "qkv": "rotary",
    "q": "attention",
    "k": "attention",
    "v": "attention",
    "attention": "proj",
    "proj": "add 1",
    "residual": "norm2",
    "norm2": "fc1",
    "fc1": "activation",
    "activation": "fc2",
    "fc2": "add 2",
    "input": "norm1",
    "norm": "fc1",
}
"""The operator whose backward pass gives the gradient of a point."""


def judge_backward(points: Sequence[PointResult], roundoff: float) -> list[OperatorResult]:
    """Walk from the head to the pixels: a gradient may differ by `GROWTH` times what its block and those before do.

    Args:
        points: of the whole model, in the order of the forward pass.
        roundoff: of the coarsest type that blocks hand on.
    """
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
