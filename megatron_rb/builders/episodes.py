"""Manipulation episodes on disk: one jsonl line per frame, images, depth and masks beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_rb.spatial.camera import Camera, resolution_problem
from megatron_rb.spatial.points import ImageSize
from megatron_rb.value.episodes import BadEpisode

ORIENTATION = 0x0112
"""EXIF tag."""


@dataclass(frozen=True)
class View:
    image: Path
    camera: Camera
    masks: Mapping[str, Path]
    """Object name -> file of its visible pixels; a hidden object has none."""
    depth: Path | None

    def mask(self, name: str) -> np.ndarray:
        """Bool [height, width]."""
        return read_mask(self.masks[name])


@dataclass(frozen=True)
class Frame:
    index: int
    step: int
    phase: str
    success: bool
    eef_position: np.ndarray
    """Gripper centre [3], world metres."""
    objects: Mapping[str, np.ndarray]
    """Object centres [3], world metres."""
    views: Mapping[str, View]


@dataclass(frozen=True)
class Episode:
    name: str
    task: str
    instruction: str
    frames: Sequence[Frame]

    def key_frames(self) -> list[int]:
        """First frame of every phase, and the last frame: the boundaries of the sub-tasks; one if nothing happens."""
        changes = [i for i in range(1, len(self.frames)) if self.frames[i].phase != self.frames[i - 1].phase]
        return sorted({0, *changes, len(self.frames) - 1})


def read_episodes(folder: Path) -> list[Episode]:
    """All episodes of `scan_episodes`.

    Raises:
        ValueError: there are none, or one is unusable.
    """
    episodes = []
    for episode in scan_episodes(folder):
        if isinstance(episode, BadEpisode):
            raise ValueError(f"{episode.reason} ({episode.place})")
        episodes.append(episode)
    return episodes


def scan_episodes(folder: Path) -> Iterator[Episode | BadEpisode]:
    """All episodes of the `*.jsonl` of a folder, in name order, usable or not; paths in them start from the folder.

    Raises:
        ValueError: the folder has no such file.
    """
    files = sorted(Path(folder).glob("*.jsonl"))
    if not files:
        raise ValueError(f"no .jsonl file in {folder}; name the folder that holds the episode files")
    for file in files:
        yield from _read_file(file)


def read_mask(path: Path) -> np.ndarray:
    """Bool [height, width] from a picture of 0 and 1, or of 0 and 255; greys, as JPEG makes them, count by half."""
    with Image.open(path) as image:
        values = np.asarray(image.convert("L") if image.mode != "L" else image)
    return values > (0 if values.max(initial=0) <= 1 else 127)


def read_depth(path: Path) -> np.ndarray:
    """Z-depth in metres, float64 [height, width], from a 16-bit PNG in millimetres; 0 = no measurement."""
    with Image.open(path) as image:
        return np.asarray(image, dtype=np.float64) / 1000.0


def _read_file(file: Path) -> Iterator[Episode | BadEpisode]:
    rows: dict[tuple[str, int], list[tuple[int, dict]]] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            rows.setdefault((str(row["task"]), int(row["episode"])), []).append((number, row))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            reason = f"{file}:{number} is not an episode frame: {error!r}; see the README there"
            yield BadEpisode(f"line {number}", "not an episode frame", reason, f"{file}:{number}")
    for (task, number), frames in rows.items():
        yield _episode(file, f"{task}_{number:03d}", task, frames)


def _episode(file: Path, name: str, task: str, lines: list[tuple[int, dict]]) -> Episode | BadEpisode:
    place, rows = f"{file}:{lines[0][0]}", [row for _, row in lines]
    numbers = [row.get("frame") for row in rows]
    if len(set(map(str, numbers))) < len(numbers):
        return BadEpisode(name, "duplicate frames", f"the frames {numbers} of {name} name one frame twice", place)
    try:
        frames = [_frame(file.parent, row) for row in rows]
        if any(b.index <= a.index for a, b in pairwise(frames)):
            return BadEpisode(name, "unordered frames", f"the frames {numbers} of {name} do not rise", place)
        return Episode(name, task, str(rows[0]["instruction"]), frames)
    except _BadFrame as bad:
        return BadEpisode(name, bad.problem, f"{name}: {bad}", place)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        reason = f"a frame of {name} lacks a field or has one of another form: {error!r}"
        return BadEpisode(name, "not an episode frame", reason, place)


class _BadFrame(Exception):
    def __init__(self, problem: str, reason: str) -> None:
        super().__init__(reason)
        self.problem = problem


def _frame(folder: Path, row: dict) -> Frame:
    return Frame(
        index=int(row["frame"]),
        step=row["step"],
        phase=row["phase"],
        success=row["success"],
        eef_position=_position(row["eef_pos"]),
        objects={name: _position(centre) for name, centre in row["objects"].items()},
        views={name: _view(folder, view) for name, view in row["views"].items()},
    )


def _position(values: object) -> np.ndarray:
    position = np.asarray(values, dtype=np.float64)
    if position.shape != (3,) or not np.isfinite(position).all():
        raise _BadFrame("unusable position", f"the position {values} is not three finite numbers of metres")
    return position


def _view(folder: Path, row: dict) -> View:
    image = folder / row["image"]
    try:
        with Image.open(image) as opened:
            size = ImageSize(*opened.size)
            turned = opened.format in ("JPEG", "MPO") and opened.getexif().get(ORIENTATION, 1) != 1
    except OSError as error:
        reason = f"cannot read the image {image} ({error}); copy it beside the jsonl file"
        raise _BadFrame("unreadable picture", reason) from error
    if turned:  # the model is shown it turned, and masks, depth and camera are not
        raise _BadFrame("picture turned by its EXIF tag", f"{image} has an EXIF orientation; store it as it is shown")
    return View(
        image=image,
        camera=_camera(row, size),
        masks={name: folder / mask for name, mask in row.get("masks", {}).items()},
        depth=folder / row["depth"] if row.get("depth") else None,
    )


def _camera(row: dict, size: ImageSize) -> Camera:
    """The camera of the picture, also where the intrinsics hold for a picture of another size, if that is stated."""
    stated = ImageSize(*row["intrinsics_size"]) if "intrinsics_size" in row else size
    try:
        camera = Camera.from_matrices(row["intrinsics"], row["camera_to_world"], stated)
    except ValueError as error:
        raise _BadFrame("unusable camera", str(error)) from error
    problem = "" if "intrinsics_size" in row else resolution_problem(camera.intrinsics, size)
    if problem:
        reason = f"{problem}; state the size they hold for as intrinsics_size: [width, height]"
        raise _BadFrame("intrinsics of another resolution", reason)
    return camera.resized(size)
