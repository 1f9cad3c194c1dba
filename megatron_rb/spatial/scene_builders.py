"""Rows about one moment: boxes of objects, affordance boxes, distances, the same object in two views."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from megatron_rb.spatial import prompts
from megatron_rb.spatial.episodes import Episode, Frame, View, read_depth
from megatron_rb.spatial.points import ImageSize, pixels_to_grid
from megatron_rb.spatial.rows import (
    OBJECT_NAMES,
    Build,
    Row,
    RowKey,
    build_row,
    pixel_truth,
    relative_path,
    to_answer,
    to_pixels,
    views_of,
    visible_point,
)
from megatron_rb.spatial.values import Box

UNITS = ("m", "cm", "inch")
GRASPING = ("approach", "descend")
"""Phases in which the object to be grasped still lies free."""
GRASPED = {"lift": "cube", "stack": "cubeA"}
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
    for frame in episode.frames:
        if name is None or frame.phase not in GRASPING:
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
            if not seen:
                continue
            seen["gripper"] = frame.eef_position
            names = sorted(seen)
            a, b = (names[i] for i in build.rng.choice(len(names), 2, replace=False))
            unit = UNITS[int(build.rng.integers(len(UNITS)))]
            metres = float(np.linalg.norm(seen[a] - seen[b]))
            question = prompts.choose(prompts.MEASURING, build.rng).format(a=a, b=b, unit=unit)
            key = RowKey("measuring", f"{episode.name}_{frame.index:02d}_{view_name}")
            image = relative_path(view.image, build.media_root)
            text = prompts.format_length(metres, unit)
            yield build_row(key, [image], f"{prompts.IMAGE}\n{question}", text, {"metres": round(metres, 6)})


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
            (u, v), (x, y) = (to_answer(view.camera.project(centre), view)[:2].astype(int) for _, view in pair)
            target = OBJECT_NAMES.get(name, name)
            question = f"{prompts.images(2)}\n{prompts.MULTI_VIEW.format(target=target, u=u, v=v)}"
            key = RowKey("multi_view", f"{episode.name}_{frame.index:02d}_{name}")
            images = [relative_path(view.image, build.media_root) for _, view in pair]
            mask = relative_path(pair[1][1].masks[name], build.media_root)
            truth = {"points": {target: [[int(x), int(y)]]}, "mask": mask}
            yield build_row(key, images, question, prompts.format_points(np.array([[x, y]])), truth)


def _box_row(key: RowKey, view: View, name: str, question: str, build: Build) -> Iterator[Row]:
    if name not in view.masks:
        build.report.skipped[f"{key.task}: hidden"] += 1
        return
    box = Box.of_mask(view.mask(name)).corners
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
        if view.depth is None:
            build.report.unchecked[task] += 1
        elif abs(_surface(view, name) - point[2]) > SURFACE_GAP:
            build.report.skipped[f"{task}: depth does not confirm the object"] += 1
            continue
        yield name


def _surface(view: View, name: str) -> float:
    """Median measured depth of an object's visible pixels, metres; NaN, which confirms nothing, when none is usable."""
    assert view.depth is not None
    depth = read_depth(view.depth)
    size = ImageSize(depth.shape[1], depth.shape[0])
    if size != view.camera.size:
        raise ValueError(f"{view.depth} is {size}, its picture {view.camera.size}; resize one of them with its camera")
    values = depth[view.mask(name)]
    values = values[np.isfinite(values) & (values > 0)]
    return float(np.median(values)) if len(values) else float("inf")


SCENE_BUILDERS: Mapping[str, Callable[[Episode, Build], Iterator[Row]]] = {
    "grounding": grounding,
    "affordance": affordance,
    "measuring": measuring,
    "multi_view": multi_view,
}
