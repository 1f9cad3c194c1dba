"""Manipulation episodes on disk: one jsonl line per frame, images, depth and masks beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_rb.spatial.camera import Camera
from megatron_rb.spatial.points import ImageSize


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
        """First frame of every phase, and the last frame: the boundaries of the sub-tasks."""
        changes = [i for i in range(1, len(self.frames)) if self.frames[i].phase != self.frames[i - 1].phase]
        return sorted({0, *changes, len(self.frames) - 1})


def read_episodes(folder: Path) -> list[Episode]:
    """All `*.jsonl` of a folder, in name order; paths in them start from the folder."""
    files = sorted(Path(folder).glob("*.jsonl"))
    if not files:
        raise ValueError(f"no .jsonl file in {folder}; name the folder that holds the episode files")
    return [episode for file in files for episode in _read_file(file)]


def read_mask(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("1"), dtype=bool)


def read_depth(path: Path) -> np.ndarray:
    """Z-depth in metres, float64 [height, width], from a 16-bit PNG in millimetres; 0 = no measurement."""
    with Image.open(path) as image:
        return np.asarray(image, dtype=np.float64) / 1000.0


def _read_file(file: Path) -> list[Episode]:
    rows: dict[int, list[dict]] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            rows.setdefault(row["episode"], []).append(row)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file}:{number} is not an episode frame: {error!r}; see the README there") from error
    return [_episode(file, number, frames) for number, frames in rows.items()]


def _episode(file: Path, number: int, rows: list[dict]) -> Episode:
    task = rows[0]["task"]
    frames = [_frame(file.parent, row) for row in sorted(rows, key=lambda row: row["frame"])]
    return Episode(f"{task}_{number:03d}", task, rows[0]["instruction"], frames)


def _frame(folder: Path, row: dict) -> Frame:
    return Frame(
        index=row["frame"],
        step=row["step"],
        phase=row["phase"],
        success=row["success"],
        eef_position=np.array(row["eef_pos"]),
        objects={name: np.array(centre) for name, centre in row["objects"].items()},
        views={name: _view(folder, view) for name, view in row["views"].items()},
    )


def _view(folder: Path, row: dict) -> View:
    image = folder / row["image"]
    try:
        with Image.open(image) as opened:
            size = ImageSize(*opened.size)
    except OSError as error:
        raise ValueError(f"cannot read the image {image} ({error}); copy it beside the jsonl file") from error
    return View(
        image=image,
        camera=Camera.from_matrices(row["intrinsics"], row["camera_to_world"], size),
        masks={name: folder / mask for name, mask in row.get("masks", {}).items()},
        depth=folder / row["depth"] if row.get("depth") else None,
    )
