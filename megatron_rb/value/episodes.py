"""Key-framed episodes, read one at a time: frame-by-frame jsonl, and the raw folders of the released value pipeline."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KEY_FRAMES, INSTRUCTIONS = "annotated_keyframes.json", "task_instruction.json"
RAW_CAMERAS = ("cam_high", "cam_left_wrist", "cam_right_wrist")

LONG_NUMBER = 20
LAST_FRAME = 10_000_000
"""Four days at 30 frames a second."""


@dataclass(frozen=True)
class VideoFrames(Sequence[str]):
    """Names under which the frames of a video file are to be stored as pictures."""

    video: Path
    pattern: str
    """With one `{frame}` field."""
    num_frames: int
    """Frames that are annotated."""

    def __len__(self) -> int:
        return self.num_frames

    def __getitem__(self, frame):  # type: ignore[no-untyped-def]
        return self.pattern.format(frame=frame)


@dataclass(frozen=True)
class KeyFramedEpisode:
    name: str
    task: str
    instructions: tuple[str, ...]
    """Ways to say the task."""
    key_frames: tuple[int, ...]
    """K_0 .. K_N: boundaries of the sub-tasks, rising frame numbers."""
    images: Mapping[str, Sequence[str]]
    """Camera -> path of every frame; empty where a frame has no such picture."""


@dataclass(frozen=True)
class BadEpisode:
    """An episode that gives no samples."""

    name: str
    problem: str
    """A few words that episodes with the same fault share."""
    reason: str
    """One sentence."""
    place: str
    """File and line, or folder."""


def read_key_framed(path: str | Path) -> Iterator[tuple[KeyFramedEpisode | BadEpisode, int]]:
    """Episodes in order with the bytes read so far; only one episode is in memory.

    Args:
        path: a jsonl file with one frame per line (fields `episode`, `frame`, `phase`, `instruction`, `views`), or with
            one raw episode folder per line (`{"episode_dir": ...}`), or a folder of raw episodes
            (`annotated_keyframes.json`, `cam_*.mp4` or `cam_*/`; `task_instruction.json` there or one folder above).

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: the folder holds no raw episode.
    """
    path = Path(path)
    if path.is_dir():
        yield from _read_folder(path)
        return
    if not path.is_file():
        raise FileNotFoundError(f"there is no file or folder {path}")
    group: list[tuple[int, dict]] = []
    read = 0
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            read += len(line)
            row = _row(line)
            if row is None or "episode_dir" in row:
                if group:
                    yield _framed(path, group), read
                    group = []
                if row is None:
                    reason = f"line {number} is not a frame of an episode; see the fields of an episode file"
                    yield BadEpisode(f"line {number}", "not an episode frame", reason, f"{path}:{number}"), read
                else:
                    listed = str(row["episode_dir"])
                    yield _raw(path.parent / listed, _label(Path(listed))), read
                continue
            if group and _identity(group[0][1]) != _identity(row):
                yield _framed(path, group), read
                group = []
            group.append((number, row))
    if group:
        yield _framed(path, group), read


def _read_folder(folder: Path) -> Iterator[tuple[KeyFramedEpisode | BadEpisode, int]]:
    found = sorted(file.parent for file in folder.rglob(KEY_FRAMES))
    if not found:
        raise ValueError(f"{folder} holds no {KEY_FRAMES}; name a jsonl file or a folder of raw episodes")
    for number, episode in enumerate(found, start=1):
        yield _raw(episode, _label(episode.relative_to(folder)) or episode.name), number


def _label(place: Path) -> str:
    """Name of a raw episode: its whole path below the data, since every task numbers its episodes anew."""
    return "/".join(part for part in place.parts if part not in ("..", "/"))


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict):
        return None
    framed = {"episode", "frame", "phase", "views"} <= row.keys() and isinstance(row["views"], dict)
    return row if framed or "episode_dir" in row else None


def _identity(row: Mapping[str, Any]) -> tuple[str, str]:
    return str(row.get("task", "")), str(row["episode"])


def _framed(file: Path, group: Sequence[tuple[int, dict]]) -> KeyFramedEpisode | BadEpisode:
    place, rows = f"{file}:{group[0][0]}", [row for _, row in group]
    task, number = _identity(rows[0])
    name = f"{task}_{int(number):03d}" if number.isdecimal() and len(number) < LONG_NUMBER else f"{task}_{number}"
    frames = [row["frame"] for row in rows]
    if len(set(map(str, frames))) < len(frames):
        return BadEpisode(name, "duplicate frames", f"the frames {frames} of {name} name one frame twice", place)
    if frames != list(range(len(frames))):
        return BadEpisode(name, "unordered frames", f"the frames {frames} of {name} are not 0, 1, 2, ...", place)
    changes = [i for i in range(1, len(rows)) if rows[i]["phase"] != rows[i - 1]["phase"]]
    keys = tuple(sorted({0, *changes, len(rows) - 1}))
    if len(keys) < 2:
        return BadEpisode(name, "fewer than two key frames", f"{name} has one frame only, so nothing happens", place)
    cameras = sorted({camera for row in rows for camera in row["views"]})
    images = {camera: [_image(row, camera) for row in rows] for camera in cameras}
    return KeyFramedEpisode(name, task, (str(rows[0].get("instruction", task)),), keys, images)


def _image(row: Mapping[str, Any], camera: str) -> str:
    view = row["views"].get(camera)
    return str(view.get("image") or "") if isinstance(view, dict) else ""


def _raw(folder: Path, name: str) -> KeyFramedEpisode | BadEpisode:
    try:
        keys = _raw_keys(json.loads((folder / KEY_FRAMES).read_text(encoding="utf-8")))
        own = folder / INSTRUCTIONS
        # The released layout has one file for all episodes of a task, in the folder above them.
        place = own if own.is_file() else folder.parent / INSTRUCTIONS
        instructions = _instructions(json.loads(place.read_text(encoding="utf-8")))
    except OSError as error:
        return BadEpisode(name, "missing file", f"{folder} cannot be read: {error}", str(folder))
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        return BadEpisode(
            name, "unusable annotation", f"the annotation of {folder} cannot be used: {error}", str(folder)
        )
    images = {camera: found for camera in RAW_CAMERAS if (found := _raw_images(folder, name, camera, keys[-1] + 1))}
    if not images:
        return BadEpisode(name, "no pictures", f"{folder} has none of {', '.join(RAW_CAMERAS)}", str(folder))
    return KeyFramedEpisode(name, name, instructions, keys, images)


def _raw_keys(annotation: Any) -> tuple[int, ...]:
    if not isinstance(annotation, list) or not annotation:
        raise ValueError(f"{KEY_FRAMES} must be a list of sub-tasks with start_frame_id and end_frame_id")
    keys = [int(item["start_frame_id"]) for item in annotation] + [int(annotation[-1]["end_frame_id"])]
    if any(b <= a for a, b in zip(keys[:-1], keys[1:], strict=True)) or keys[0] < 0:
        raise ValueError(f"key frames {keys} do not rise")
    if keys[-1] > LAST_FRAME:
        raise ValueError(f"key frame {keys[-1]} is beyond any recording ({LAST_FRAME} frames)")
    return tuple(keys)


def _instructions(given: Any) -> tuple[str, ...]:
    if isinstance(given, dict):
        given = given.get("instructions", given.get("instruction"))
    listed = [given] if isinstance(given, str) else given
    if not isinstance(listed, list) or not listed or not all(isinstance(item, str) and item for item in listed):
        raise ValueError(f"{INSTRUCTIONS} must hold a list of sentences, or 'instructions' or 'instruction'")
    return tuple(listed)


def _raw_images(folder: Path, name: str, camera: str, count: int) -> Sequence[str]:
    video, frames = folder / f"{camera}.mp4", folder / camera
    if video.is_file():
        return VideoFrames(video, f"frames/{_escaped(name)}/{camera}_{{frame:06d}}.jpg", count)
    if frames.is_dir():
        found = [str(file) for file in frames.iterdir() if file.suffix.lower() in (".jpg", ".jpeg", ".png")]
        return sorted(found, key=_natural)
    return []


def _natural(name: str) -> list[tuple[int, str]]:
    """`frame2` before `frame10`."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", name)]


def _escaped(name: str) -> str:
    """For `str.format`."""
    return name.replace("{", "{{").replace("}", "}}")
