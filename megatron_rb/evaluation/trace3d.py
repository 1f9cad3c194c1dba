"""TraceSpatial: does a 3-D trace start at the object, end at its destination, and touch nothing on the way?

Protocol (RoboTracer / RoboBrain 2.5, 100 scenes). Start: the first point within 0.20 m of the object's points or of
the true first point. End: one of the last three points within 0.20 m of the destination's oriented box. Collision: the
object's points, moved along with the trace, have more than 20 % inside occupied space at any predicted point. Success:
start and end without collision, over all answers. A sample without depth leaves the denominators of start and end, not
that of success.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

REACH = 0.20
"""Metres for start and end."""
LAST_POINTS = 3
COLLIDING_SHARE = 0.20
VOXEL = 0.02
"""Metres."""
TRUNCATION = 4
"""Voxels behind a surface that count as occupied; beyond them space is unknown and taken for free."""


@dataclass(frozen=True)
class OrientedBox:
    center: np.ndarray
    """[3] metres."""
    extent: np.ndarray
    """[3] full lengths, metres."""
    rotation: np.ndarray
    """[3, 3], box axes as columns."""

    def distance(self, points: np.ndarray) -> np.ndarray:
        """[n] metres from points [n, 3] to the box; 0 inside."""
        local = (np.asarray(points, dtype=np.float64) - self.center) @ self.rotation
        return np.linalg.norm(np.maximum(np.abs(local) - self.extent / 2, 0.0), axis=1)


@dataclass(frozen=True)
class OccupiedSpace:
    """What a depth picture shows as occupied: everything from the surface to `TRUNCATION` voxels behind it.

    The paper fuses a truncated signed distance field; for one depth picture that is this rule on voxels.
    """

    depth: np.ndarray
    """[height, width] metres, 0 where there is nothing, the moved object taken out."""
    intrinsics: np.ndarray
    """3 x 3, pixels of the depth picture."""

    def occupied(self, points: np.ndarray) -> np.ndarray:
        """Bool [n] for camera XYZ [n, 3]: the voxel of the point lies in or behind a surface, but not far behind."""
        centres = (np.floor(points / VOXEL) + 0.5) * VOXEL
        z = centres[:, 2]
        ahead = z > 0
        pixels = (centres / np.where(ahead, z, 1.0)[:, None]) @ self.intrinsics.T
        columns, rows = np.floor(pixels[:, 0]).astype(int), np.floor(pixels[:, 1]).astype(int)
        height, width = self.depth.shape
        seen = ahead & (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
        surface = np.zeros(len(points))
        surface[seen] = self.depth[rows[seen], columns[seen]]
        behind = z - surface
        return seen & (surface > 0) & (behind >= 0) & (behind <= TRUNCATION * VOXEL)


@dataclass(frozen=True)
class TraceScene:
    start: np.ndarray
    """[3] true first point, camera XYZ metres."""
    object_points: np.ndarray
    """[n, 3] camera XYZ of the object."""
    destination: OrientedBox
    space: OccupiedSpace | None
    """None = the sample has no depth."""


@dataclass(frozen=True)
class TraceScore:
    start: bool | None
    """None = not judged, for want of depth."""
    end: bool | None
    collision: bool
    success: bool


def score_trace(points: np.ndarray | None, scene: TraceScene) -> TraceScore:
    """Judge one answer.

    Args:
        points: [n, 3] camera XYZ metres; None or empty = the answer could not be read, which fails everything.
    """
    judged = scene.space is not None
    if points is None or len(points) == 0:
        return TraceScore(False if judged else None, False if judged else None, False, False)
    points = np.asarray(points, dtype=np.float64)
    near_object = len(scene.object_points) and np.linalg.norm(scene.object_points - points[0], axis=1).min() < REACH
    start = bool(near_object or np.linalg.norm(points[0] - scene.start) < REACH)
    end = bool((scene.destination.distance(points[-LAST_POINTS:]) < REACH).any())
    if scene.space is None:
        return TraceScore(None, None, False, False)
    hit = collides(points, scene.object_points, scene.space)
    return TraceScore(start, end, hit, start and end and not hit)


def collides(trace: np.ndarray, object_points: np.ndarray, space: OccupiedSpace) -> bool:
    """Whether the object, moved with the trace without turning, has over 20 % of its points in occupied space."""
    if len(object_points) == 0:
        return False
    centre = object_points.mean(axis=0)
    moved = [object_points + (point - centre) for point in trace]
    return any(float(space.occupied(cloud).mean()) > COLLIDING_SHARE for cloud in moved)


def summarise(scores: Sequence[TraceScore]) -> dict[str, float]:
    """Shares of start and end over the judged samples, of collision and success over all."""
    if not scores:
        raise ValueError("there are no scores to summarise; give at least one")
    starts = [score.start for score in scores if score.start is not None]
    ends = [score.end for score in scores if score.end is not None]
    return {
        "start": float(np.mean(starts)) if starts else float("nan"),
        "end": float(np.mean(ends)) if ends else float("nan"),
        "collision": float(np.mean([score.collision for score in scores])),
        "success": float(np.mean([score.success for score in scores])),
    }


def clean_object_cloud(points: np.ndarray, neighbours: int = 10, deviations: float = 1.2) -> np.ndarray:
    """The object's points [n, 3] without outliers: those whose mean distance to their nearest neighbours is more than
    `deviations` standard deviations above the mean of all; a cloud of at most `neighbours` points stays as it is.
    """
    points = np.asarray(points, dtype=np.float64)
    if len(points) <= neighbours:
        return points
    distances = np.linalg.norm(points[:, None] - points[None], axis=-1)
    near = np.partition(distances, neighbours, axis=1)[:, : neighbours + 1].sum(axis=1) / neighbours
    return points[near <= near.mean() + deviations * near.std()]
