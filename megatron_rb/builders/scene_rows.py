"""Rows about one moment: boxes of objects, affordance boxes, distances, the same object in two views."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from megatron_rb.builders.episodes import Episode, Frame, View
from megatron_rb.builders.rows import (
    GRASPED,
    OBJECT_NAMES,
    Build,
    Row,
    RowKey,
    build_row,
    measured_depth,
    pixel_truth,
    relative_path,
    seen_pixels,
    to_pixels,
    views_of,
    visible_mask,
    visible_point,
)
from megatron_rb.spatial import prompts
from megatron_rb.spatial.depth import FARTHEST, DepthProblem
from megatron_rb.spatial.points import pixels_to_grid
from megatron_rb.spatial.values import Box

UNITS = ("m", "cm", "inch")
GRASPING = ("approach", "descend")
"""Phases in which the object to be grasped still lies free."""
SURFACE_GAP = 0.05
"""Metres: how far the measured surface may lie from an object's centre before it is something else's surface."""


def grounding(episode: Episode, build: Build) -> Iterator[Row]:
    """The box around an object's visible pixels."""
    for frame in episode.frames:
        for view_name, view in views_of(frame, build.mix.views):
            for name in frame.objects:
                target = OBJECT_NAMES.get(name, name)
                key = RowKey("grounding", f"{episode.name}_{frame.index:02d}_{view_name}_{name}")
                yield from _box_row(key, view, name, prompts.GROUNDING.format(target=f"the {target}"), build)


def affordance(episode: Episode, build: Build) -> Iterator[Row]:
    """Where to grasp: the box of the object to be picked up, while it still lies free."""
    name = GRASPED.get(episode.task)
    if name is None:
        build.report.skipped[f"affordance: which object the task {episode.task} grasps is not known"] += 1
        return
    for frame in episode.frames:
        if frame.phase not in GRASPING:
            continue
        for view_name, view in views_of(frame, build.mix.views):
            key = RowKey("affordance", f"{episode.name}_{frame.index:02d}_{view_name}")
            question = prompts.AFFORDANCE.format(instruction=episode.instruction)
            yield from _box_row(key, view, name, question, build)


def measuring(episode: Episode, build: Build) -> Iterator[Row]:
    """Distance between the centres of two things that are both seen, in metres, centimetres or inches."""
    for frame in episode.frames:
        for view_name, view in views_of(frame, build.mix.views):
            seen = {
                OBJECT_NAMES.get(name, name): frame.objects[name] for name in _seen(frame, view, build, "measuring")
            }
            gripper, reason = seen_pixels(view.camera, frame.eef_position)
            if gripper is not None:
                seen["gripper"] = frame.eef_position
            if len(seen) < 2:
                build.report.skipped[f"measuring: {f'gripper {reason}' if reason else 'nothing but the gripper'}"] += 1
                continue
            if view.depth is None:
                build.report.unchecked["measuring"] += 1
            names = sorted(seen)
            a, b = (names[i] for i in build.rng.choice(len(names), 2, replace=False))
            unit = UNITS[int(build.rng.integers(len(UNITS)))]
            metres = float(np.linalg.norm(seen[a] - seen[b]))
            question = prompts.choose(prompts.MEASURING, build.rng).format(a=a, b=b, unit=unit)
            key = RowKey("measuring", f"{episode.name}_{frame.index:02d}_{view_name}")
            image = relative_path(view.image, build.media_root)
            text = prompts.format_length(metres, unit)
            truth = {"metres": round(metres, 6), "unit": unit}
            yield build_row(key, [image], f"{prompts.IMAGE}\n{question}", text, truth)


def multi_view(episode: Episode, build: Build) -> Iterator[Row]:
    """An object's point in a second view from its point in the first; frames that have all views only."""
    for frame in episode.frames:
        pair = [(name, view) for name, view in sorted(frame.views.items()) if name in ("front", "side")]
        if len(pair) < 2:
            build.report.skipped["multi_view: fewer than two views"] += 1
            continue
        for name, centre in frame.objects.items():
            points = [visible_point(view, name, centre) for _, view in pair]
            hidden = next((reason for point, reason in points if point is None), "")
            if hidden:
                build.report.skipped[f"multi_view: {hidden}"] += 1
                continue
            yield _other_view_row(episode, frame, name, [view for _, view in pair], build)


def _other_view_row(episode: Episode, frame: Frame, name: str, views: Sequence[View], build: Build) -> Row:
    pixels = [view.camera.project(frame.objects[name])[None, :2] for view in views]
    target = OBJECT_NAMES.get(name, name)
    if build.mix.version == "2.0":
        first, second = (to_pixels(uv, view, build.mix) for uv, view in zip(pixels, views, strict=True))
        truth: dict[str, object] = {"points": pixel_truth(second, views[1], build.mix)}
    else:
        first, second = (pixels_to_grid(uv, view.camera.size) for uv, view in zip(pixels, views, strict=True))
        truth = {"points": {target: second.tolist()}}
    (u, v) = first[0].tolist()
    question = f"{prompts.images(2)}\n{prompts.MULTI_VIEW.format(target=target, u=u, v=v)}"
    key = RowKey("multi_view", f"{episode.name}_{frame.index:02d}_{name}")
    images = [relative_path(view.image, build.media_root) for view in views]
    truth["mask"] = relative_path(views[1].masks[name], build.media_root)
    return build_row(key, images, question, prompts.format_points(second), truth)


def _box_row(key: RowKey, view: View, name: str, question: str, build: Build) -> Iterator[Row]:
    mask, reason = visible_mask(view, name)
    if mask is None:
        build.report.skipped[f"{key.task}: {reason}"] += 1
        return
    box = Box.of_mask(mask).corners
    image = relative_path(view.image, build.media_root)
    truth: dict[str, object] = {"mask": relative_path(view.masks[name], build.media_root)}
    if build.mix.version == "2.0":
        corners = to_pixels(box.values, view, build.mix)
        truth["points"] = pixel_truth(corners, view, build.mix)
    else:
        corners = pixels_to_grid(box.values, view.camera.size)
        truth["points"] = {"box": corners.tolist()}
    truth["box"] = corners.ravel().tolist()
    yield build_row(key, [image], f"{prompts.IMAGE}\n{question}", prompts.format_box(corners), truth)


def _seen(frame: Frame, view: View, build: Build, task: str) -> Iterator[str]:
    """Objects whose centre is not covered, by the masks and, where there is a depth picture, by it as well."""
    for name, centre in frame.objects.items():
        point, reason = visible_point(view, name, centre)
        if point is None:
            build.report.skipped[f"{task}: {reason}"] += 1
            continue
        problem = "" if view.depth is None else _depth_problem(view, name, float(point[2]))
        if problem:
            build.report.skipped[f"{task}: {problem}"] += 1
            continue
        yield name


def _depth_problem(view: View, name: str, z: float) -> str:
    """Why the depth picture does not confirm that an object's centre is at z-depth `z`; empty when it does."""
    depth, problem = measured_depth(view)
    if depth is None:
        return problem
    values = depth[view.mask(name)]
    values = values[np.isfinite(values) & (values > 0) & (values <= FARTHEST)]
    if not len(values):
        return DepthProblem.MISSING
    return "" if abs(float(np.median(values)) - z) <= SURFACE_GAP else "depth does not confirm the object"


SCENE_BUILDERS: Mapping[str, Callable[[Episode, Build], Iterator[Row]]] = {
    "grounding": grounding,
    "affordance": affordance,
    "measuring": measuring,
    "multi_view": multi_view,
}
