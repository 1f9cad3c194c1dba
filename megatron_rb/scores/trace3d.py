"""TraceSpatial: does a 3-D trace start at the object, end at its destination, and touch nothing on the way?

Protocol (RoboTracer / RoboBrain 2.5, 100 scenes; its released evaluation). Start: the first point within 0.20 m of the
object's points or of the true first point. End: one of the last three points, or the last of fewer, within 0.20 m of
the destination's oriented box. Collision: the object's points, moved as the trace moves from its first point, have
more than 20 % inside occupied voxels at any predicted point; nothing is interpolated. Success: start and end without
collision, over all answers. An answer without depth leaves the denominators of start and end, not that of success.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_rb.spatial.clouds import clean_cloud
from megatron_rb.spatial.depth import FARTHEST
from megatron_rb.spatial.tsdf import OccupiedVoxels, occupied_voxels

REACH = 0.20
"""Metres for start and end."""
LAST_POINTS = 3
COLLIDING_SHARE = 0.20


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

    def corners(self) -> np.ndarray:
        """[8, 3] metres."""
        signs = np.stack(np.meshgrid(*[(-0.5, 0.5)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
        return (signs * self.extent) @ self.rotation.T + self.center


@dataclass(frozen=True)
class TraceScene:
    start: np.ndarray
    """[3] true first point, camera XYZ metres."""
    object_points: np.ndarray
    """[n, 3] camera XYZ of the object, cleaned."""
    destination: OrientedBox
    space: OccupiedVoxels | None
    """None = the sample has no depth."""


@dataclass(frozen=True)
class TraceScore:
    start: bool | None
    """None = not judged, for want of depth."""
    end: bool | None
    collision: bool
    success: bool


def build_scene(
    depth: np.ndarray, mask: np.ndarray, intrinsics: np.ndarray, start: np.ndarray, destination: OrientedBox
) -> TraceScene:
    """A scene from its pictures.

    Args:
        depth: `[height, width]` z-depth in metres, 0 = nothing measured.
        mask: bool `[height, width]`, the object that is moved; it does not stand in its own way.
        intrinsics: 3 x 3, pixels of the depth picture.
    """
    if depth.shape != mask.shape:
        raise ValueError(
            f"the depth picture is {depth.shape} and the mask {mask.shape}; they must show the same pixels"
        )
    rows, columns = np.nonzero(mask & (depth > 0) & (depth < FARTHEST))
    z = depth[rows, columns]
    x = (columns - intrinsics[0, 2]) * z / intrinsics[0, 0]
    y = (rows - intrinsics[1, 2]) * z / intrinsics[1, 1]
    cloud = clean_cloud(np.stack([x, y, z], axis=-1))
    space = occupied_voxels(np.where(mask, 0.0, depth), intrinsics)
    return TraceScene(np.asarray(start, dtype=np.float64), cloud, destination, space)


def score_trace(points: np.ndarray | None, scene: TraceScene) -> TraceScore:
    """Judge one answer by the protocol above.

    Args:
        points: [n, 3] camera XYZ metres; None or empty = the answer could not be read, which fails everything.
    """
    judged = scene.space is not None
    if points is None or len(points) == 0:
        return TraceScore(False if judged else None, False if judged else None, False, False)
    points = np.asarray(points, dtype=np.float64)
    near_object = len(scene.object_points) and np.linalg.norm(scene.object_points - points[0], axis=1).min() < REACH
    start = bool(near_object or np.linalg.norm(points[0] - scene.start) < REACH)
    end = bool((scene.destination.distance(last_points(points)) < REACH).any())
    if scene.space is None:
        return TraceScore(None, None, False, False)
    hit = collides(points, scene.object_points, scene.space)
    return TraceScore(start, end, hit, start and end and not hit)


def last_points(trace: np.ndarray) -> np.ndarray:
    """The points of which one has to reach the destination."""
    return trace[-LAST_POINTS:] if len(trace) >= LAST_POINTS else trace[-1:]


def collides(trace: np.ndarray, object_points: np.ndarray, space: OccupiedVoxels) -> bool:
    """Whether the object, moved with the trace without turning, has over 20 % of its points in occupied voxels."""
    if len(object_points) == 0:
        return False
    moved = (object_points + (point - trace[0]) for point in trace)
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
