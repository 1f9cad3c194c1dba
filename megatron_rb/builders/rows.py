"""What all builders share: the settings of a pass, its report, and the form of a row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rb.builders.episodes import Frame, View, read_depth
from megatron_rb.spatial.camera import Camera
from megatron_rb.spatial.depth import DepthGate, DepthProblem
from megatron_rb.spatial.points import ImageSize, inside, pixel_index, pixels_to_grid

Row = dict[str, Any]

OBJECT_NAMES = {"cube": "red cube", "cubeA": "red cube", "cubeB": "green cube"}
GRASPED = {"lift": "cube", "stack": "cubeA"}
"""Task -> the object that is moved."""
MOST_WAYPOINTS = 8
DEMO_TASKS = ("pointing", "uvd", "waypoints", "hop")

WITH_DEPTH = ("uvd", "waypoints", "trace_3d", "trace_object", "trace_lift")
"""Tasks of RoboBrain 2.5 alone."""


@dataclass(frozen=True)
class SampleMix:
    tasks: Sequence[str] = DEMO_TASKS
    """Which kinds of rows to build."""
    views: Sequence[str] = ("side",)
    """Cameras for pointing, uvd and waypoints; one row each."""
    windows: int = 0
    """Random windows per object, frame and view for pointing and uvd; 0 = the whole picture, once."""
    window_side: int = 128
    """Pixels."""
    hop_views: Sequence[str] = ("side",)
    """Cameras shown together in one hop row; a row has one picture of each for BEFORE and AFTER."""
    hop_references: bool = False
    """Show the episode's first and last state too (REF-START, REF-END)."""
    hops_per_episode: int = 12
    zero_hop_share: float = 0.05
    """Share of the hop rows whose two states are the same frame."""
    version: str = "2.5"
    """Form of questions and answers: `2.5` (0-1000) or `2.0` (absolute pixels)."""
    answer_size: ImageSize | None = None
    """For 2.0: size of the picture that the model is shown, whose pixels it answers in; None = the picture's own."""
    gate: DepthGate = field(default_factory=DepthGate)
    """Which traces the depth pictures must confirm; a row of a view without any is built and counted as unchecked."""

    def __post_init__(self) -> None:
        if self.version not in ("2.0", "2.5"):
            raise ValueError(f"version '{self.version}' is not known; use 2.0 or 2.5")
        solid = [task for task in self.tasks if task in WITH_DEPTH]
        if self.version == "2.0" and solid:
            raise ValueError(
                f"RoboBrain 2.0 answers in pixels without depth; leave out the tasks {', '.join(solid)}, whose answers "
                f"are 0-1000 with metres"
            )


@dataclass
class BuildReport:
    rows: Counter[str] = field(default_factory=Counter)
    """Rows by task."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Candidates without a row, by `task: reason`."""
    refused: Counter[str] = field(default_factory=Counter)
    """Episodes without rows, by problem."""
    unchecked: Counter[str] = field(default_factory=Counter)
    """Rows by task whose points no depth picture could confirm."""


@dataclass(frozen=True)
class Build:
    """What every builder of one pass shares."""

    mix: SampleMix
    media_root: Path
    rng: np.random.Generator
    report: BuildReport


def seen_pixels(camera: Camera, world: np.ndarray) -> tuple[np.ndarray | None, str]:
    """(u pixels, v pixels, z-depth) of world points [..., 3], or None and the reason why one of them has none."""
    if (camera.world_to_camera(world)[..., 2] <= 0).any():
        return None, "behind the camera"
    points = camera.project(world)
    return (points, "") if inside(points[..., :2], camera.size).all() else (None, "outside the image")


def visible_mask(view: View, name: str) -> tuple[np.ndarray | None, str]:
    """Bool [height, width] of an object's visible pixels, or None and the reason why there is none."""
    if name not in view.masks:
        return None, "hidden"
    try:
        mask = view.mask(name)
    except OSError:
        return None, "mask cannot be read"
    if mask.shape != (view.camera.size.height, view.camera.size.width):
        return None, "mask of another resolution"
    return (mask, "") if mask.any() else (None, "empty mask")


def measured_depth(view: View) -> tuple[np.ndarray | None, str]:
    """Metres [height, width], or None and the reason why the depth picture of a view that has one cannot be used."""
    assert view.depth is not None
    try:
        depth = read_depth(view.depth)
    except (OSError, ValueError):
        return None, DepthProblem.UNREADABLE
    if depth.shape != (view.camera.size.height, view.camera.size.width):
        return None, DepthProblem.OTHER_SIZE
    return depth, ""


def visible_point(view: View, name: str, centre: np.ndarray) -> tuple[np.ndarray | None, str]:
    """(u pixels, v pixels, z-depth of the centre) of an object, or None and the reason why it has none."""
    point, reason = seen_pixels(view.camera, centre)
    if point is None:
        return None, reason
    mask, reason = visible_mask(view, name)
    if mask is None:
        return None, reason
    if not mask[pixel_index(point[:2], view.camera.size)]:
        return None, "centre covered by something nearer"
    return point, ""


def to_answer(point: np.ndarray, view: View) -> np.ndarray:
    """(u pixels, v pixels, metres) -> (0-1000, 0-1000, metres with three decimals)."""
    grid = pixels_to_grid(point[..., :2], view.camera.size)
    return np.concatenate([grid, np.round(point[..., 2:], 3)], axis=-1)


@dataclass(frozen=True)
class RowKey:
    task: str
    name: str
    """Unique among the rows of the task."""


def views_of(frame: Frame, names: Sequence[str]) -> list[tuple[str, View]]:
    return [(name, frame.views[name]) for name in names if name in frame.views]


def build_row(key: RowKey, images: Sequence[str], question: str, answer: str, truth: Mapping[str, object]) -> Row:
    return {
        "id": f"{key.name}_{key.task}",
        "task": key.task,
        "image": list(images),
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
        "answer": answer,
        **truth,
    }


def relative_path(path: Path, root: Path) -> str:
    try:
        return path.relative_to(root).as_posix()
    except ValueError as error:
        raise ValueError(f"{path} is outside the media root {root}; name a folder that holds the episodes") from error


def as_listed(point: np.ndarray) -> list[float]:
    return [int(point[0]), int(point[1]), round(float(point[2]), 3)]


def to_pixels(points: np.ndarray, view: View, mix: SampleMix) -> np.ndarray:
    """[n, 2] pixels of the view -> nearest whole pixels of the picture that a RoboBrain 2.0 model is shown."""
    size = mix.answer_size or view.camera.size
    return np.clip(np.rint(points / view.camera.size.extent * size.extent), 0, size.extent - 1).astype(np.int64)


def pixel_truth(points: np.ndarray, view: View, mix: SampleMix) -> dict[str, Any]:
    """The `points` entry of a row whose answer is in pixels: it says so, with the size they belong to."""
    size = mix.answer_size or view.camera.size
    return {"points": points.tolist(), "frame": "pixels", "size": [size.width, size.height]}
