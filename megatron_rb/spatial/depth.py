"""Is a measured depth usable, does it confirm a point, is a point hidden? Gates on depth pictures.

Sources: RoboTracer / RoboBrain 2.5 data quality checks (|D(u) - z| below 5 cm on a third of the frames for DROID, on
83 % for AgiBot; at most 30 % of a trace hidden); depth beyond 15 m is not used.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import Enum

import numpy as np

from megatron_rb.spatial.points import ImageSize, inside, pixel_index

FARTHEST = 15.0
"""Metres."""


class DepthProblem(str, Enum):
    OUTSIDE = "outside the image"
    MISSING = "no measurement (depth 0)"
    NOT_FINITE = "not a finite number"
    TOO_FAR = "beyond 15 m"
    OTHER_SIZE = "depth of another resolution"
    UNREADABLE = "depth cannot be read"

    __str__ = str.__str__


@dataclass(frozen=True)
class DepthReading:
    metres: float
    """NaN when it cannot be used."""
    problem: DepthProblem | None = None

    @property
    def ok(self) -> bool:
        return self.problem is None


@dataclass(frozen=True)
class DepthGate:
    """When the depth pictures confirm a trace."""

    tolerance: float = 0.05
    """Metres between the measured surface and the point."""
    confirmed_share: float = 1 / 3
    """Of all points, those without a measurement too: a third (DROID); AgiBot asks for 0.83."""
    most_hidden: float = 0.3
    """Largest share of the points with a measurement that something nearer covers."""


@dataclass(frozen=True)
class GateResult:
    passed: bool
    confirmed: float
    """Share of all points that are measured within the tolerance."""
    hidden: float
    """Share of the readable points that lie behind the surface by more than the tolerance."""
    readable: int
    """Points with a usable measurement."""
    reason: str = ""
    """Why it did not pass."""


def read_at(depth: np.ndarray, pixel: np.ndarray, size: ImageSize) -> DepthReading:
    """The measurement at one pixel.

    Args:
        depth: [height, width] metres; 0 = no measurement.
        pixel: [2] (u, v) of an image of `size`.
    """
    nan = float("nan")
    if depth.shape != (size.height, size.width):
        return DepthReading(nan, DepthProblem.OTHER_SIZE)
    if not inside(pixel, size):
        return DepthReading(nan, DepthProblem.OUTSIDE)
    value = float(depth[pixel_index(pixel, size)])
    if not np.isfinite(value):
        return DepthReading(nan, DepthProblem.NOT_FINITE)
    if value <= 0:
        return DepthReading(nan, DepthProblem.MISSING)
    return DepthReading(value) if value <= FARTHEST else DepthReading(nan, DepthProblem.TOO_FAR)


def check_trace(points: np.ndarray, readings: list[DepthReading], gate: DepthGate | None = None) -> GateResult:
    """Whether the measurements at the points of a trace confirm it.

    Args:
        points: [n, 3] (u, v, z-depth metres).
        readings: one per point.
    """
    gate = gate or DepthGate()
    pairs = [(r.metres, float(z)) for r, z in zip(readings, points[:, 2], strict=True) if r.ok]
    if not pairs:
        usual = Counter(str(reading.problem) for reading in readings).most_common(1)
        return GateResult(False, 0.0, 0.0, 0, f"no point has a usable depth: {usual[0][0] if usual else 'no points'}")
    surface, z = np.array(pairs).T
    confirmed = float((np.abs(surface - z) < gate.tolerance).sum() / len(readings))
    hidden = float((surface < z - gate.tolerance).mean())
    reason = ""
    if confirmed < gate.confirmed_share:
        reason = f"depth confirms {confirmed:.0%} of the points, {gate.confirmed_share:.0%} are needed"
    elif hidden > gate.most_hidden:
        reason = f"{hidden:.0%} of the points are hidden, at most {gate.most_hidden:.0%} may be"
    return GateResult(not reason, confirmed, hidden, len(pairs), reason)
