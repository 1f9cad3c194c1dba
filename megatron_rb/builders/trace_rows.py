"""Rows about the way of the gripper or of what it moves: 3-D traces, 2-D traces, and the lifting of one to the other.

Source: RoboTracer / RoboBrain 2.5: at most 8 key points by Ramer-Douglas-Peucker, depth in metres with three decimals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_rb.builders.episodes import Episode, Frame, View
from megatron_rb.builders.rows import (
    GRASPED,
    OBJECT_NAMES,
    Build,
    Row,
    RowKey,
    as_listed,
    build_row,
    measured_depth,
    pixel_truth,
    relative_path,
    seen_pixels,
    to_answer,
    to_pixels,
    views_of,
    visible_point,
)
from megatron_rb.spatial import prompts
from megatron_rb.spatial.depth import DepthProblem, DepthReading, check_trace, read_at
from megatron_rb.spatial.traces import key_points

LEAST_WAY = 0.02
"""Metres that an object has to move for its way to be asked for."""


@dataclass(frozen=True)
class _Way:
    """A way from one key frame to the end, seen by the camera of that frame."""

    name: str
    view: View
    image: str
    points: np.ndarray
    """[n, 3] (u pixels, v pixels, z-depth metres), n <= 8."""
    episode: Episode


def trace_3d(episode: Episode, build: Build) -> Iterator[Row]:
    """The task in words -> (u, v, d) key points."""
    for way in _ways(episode, build, "trace_3d"):
        answer = to_answer(way.points, way.view)
        truth = {"points": {"end effector": [as_listed(point) for point in answer]}}
        question = prompts.waypoints(episode.instruction)
        key = RowKey("trace_3d", way.name)
        yield build_row(key, [way.image], question, prompts.format_points_with_depth(answer), truth)


def trace_object(episode: Episode, build: Build) -> Iterator[Row]:
    """The task in words -> (u, v, d) key points of the object that is moved, from where it is seen."""
    name = GRASPED.get(episode.task)
    if name is None:
        build.report.skipped[f"trace_object: which object the task {episode.task} moves is not known"] += 1
        return
    for way in _ways(episode, build, "trace_object", name):
        answer = to_answer(way.points, way.view)
        truth = {"points": {OBJECT_NAMES.get(name, name): [as_listed(point) for point in answer]}}
        question = f"{prompts.IMAGE}\n{prompts.OBJECT_TRACE.format(instruction=episode.instruction)}"
        key = RowKey("trace_object", way.name)
        yield build_row(key, [way.image], question, prompts.format_points_with_depth(answer), truth)


def trace_2d(episode: Episode, build: Build) -> Iterator[Row]:
    """The task in words -> (u, v) key points; in version 2.0 as pixels."""
    for way in _ways(episode, build, "trace_2d"):
        key = RowKey("trace_2d", way.name)
        if build.mix.version == "2.0":
            pixels = to_pixels(way.points[:, :2], way.view, build.mix)
            question = f"{prompts.IMAGE}\n{prompts.TRAJECTORY_20.format(instruction=episode.instruction)}"
            truth: dict[str, object] = {"points": pixel_truth(pixels, way.view, build.mix)}
            yield build_row(key, [way.image], question, str(pixels.tolist()), truth)
            continue
        answer = to_answer(way.points, way.view)[:, :2].astype(int)
        question = f"{prompts.IMAGE}\n{prompts.TRACE_2D.format(instruction=episode.instruction)}"
        truth = {"points": {"end effector": answer.tolist()}}
        yield build_row(key, [way.image], question, prompts.format_points(answer), truth)


def trace_lift(episode: Episode, build: Build) -> Iterator[Row]:
    """A 2-D trace is given, its depths are asked for."""
    for way in _ways(episode, build, "trace_lift"):
        answer = to_answer(way.points, way.view)
        flat = prompts.format_points(answer[:, :2])
        question = f"{prompts.IMAGE}\n{prompts.LIFTING.format(instruction=episode.instruction, trace=flat)}"
        truth = {"points": {"end effector": [as_listed(point) for point in answer]}}
        key = RowKey("trace_lift", way.name)
        yield build_row(key, [way.image], question, prompts.format_points_with_depth(answer), truth)


def _ways(episode: Episode, build: Build, task: str, moved: str = "") -> Iterator[_Way]:
    """Ways of the gripper, or of the object `moved`."""
    for index in episode.key_frames()[:-1]:
        frames = episode.frames[index:]
        if any(moved and moved not in frame.objects for frame in frames):
            build.report.skipped[f"{task}: the object's place is not known"] += 1
            continue
        positions = np.array([frame.objects[moved] if moved else frame.eef_position for frame in frames])
        if moved and np.linalg.norm(positions - positions[0], axis=1).max() < LEAST_WAY:
            build.report.skipped[f"{task}: the object does not move any more"] += 1
            continue
        for name, view in views_of(episode.frames[index], build.mix.views):
            points, reason = seen_pixels(view.camera, positions)
            if points is not None and moved:
                _, reason = visible_point(view, moved, positions[0])
            if points is None or reason:
                build.report.skipped[f"{task}: {reason}"] += 1
                continue
            if not _confirmed(frames, positions, name, build, task):
                continue
            image = relative_path(view.image, build.media_root)
            kept = key_points(positions)
            yield _Way(f"{episode.name}_{index:02d}_{name}", view, image, points[kept], episode)


def _confirmed(frames: Sequence[Frame], positions: np.ndarray, name: str, build: Build, task: str) -> bool:
    """Whether the depth pictures of the frames show something where the trace says; without any, nothing speaks
    against it."""
    measured = [
        _reading(frame.views[name], position)
        for frame, position in zip(frames, positions, strict=True)
        if name in frame.views and frame.views[name].depth is not None
    ]
    if not measured:
        build.report.unchecked[task] += 1
        return True
    points, readings = zip(*measured, strict=True)
    result = check_trace(np.array(points), list(readings), build.mix.gate)
    if not result.passed:
        why = "hidden gate" if result.hidden > build.mix.gate.most_hidden else "depth gate"
        build.report.skipped[f"{task}: {result.reason if not result.readable else why}"] += 1
    return result.passed


def _reading(view: View, position: np.ndarray) -> tuple[np.ndarray, DepthReading]:
    """Where the frame's own camera, which may have moved, sees a position, and what its depth picture says there."""
    nowhere, nan = np.full(3, np.nan), float("nan")
    point, _ = seen_pixels(view.camera, position)
    if point is None:
        return nowhere, DepthReading(nan, DepthProblem.OUTSIDE)
    depth, problem = measured_depth(view)
    if depth is None:
        return point, DepthReading(nan, DepthProblem(problem))
    return point, read_at(depth, point[:2], view.camera.size)


TRACE_BUILDERS: Mapping[str, Callable[[Episode, Build], Iterator[Row]]] = {
    "trace_3d": trace_3d,
    "trace_object": trace_object,
    "trace_2d": trace_2d,
    "trace_lift": trace_lift,
}
