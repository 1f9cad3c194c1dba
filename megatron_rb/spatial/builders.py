"""Episodes -> rows of a training file: pointing, points and waypoints with depth, hops.

A row is a ShareGPT conversation with its ground truth beside it. What cannot be seen makes no row; it is counted.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rb.spatial import prompts
from megatron_rb.spatial.episodes import Episode, Frame, View, read_episodes
from megatron_rb.spatial.points import inside, pixel_index, pixels_to_grid
from megatron_rb.spatial.windows import cut, window_around
from megatron_rb.value.answers import format_score
from megatron_rb.value.hops import progress, sample_states
from megatron_rb.value.sampling import balanced_pairs

Row = dict[str, Any]

OBJECT_NAMES = {"cube": "red cube", "cubeA": "red cube", "cubeB": "green cube"}
MOST_WAYPOINTS = 8
DEMO_TASKS = ("pointing", "uvd", "waypoints", "hop")


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


@dataclass
class BuildReport:
    rows: Counter[str] = field(default_factory=Counter)
    """Rows by task."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Candidates without a row, by `task: reason`."""


@dataclass(frozen=True)
class _Build:
    """What every builder of one pass shares."""

    mix: SampleMix
    media_root: Path
    rng: np.random.Generator
    report: BuildReport


def build_rows(
    episodes: Sequence[Episode], media_root: Path, mix: SampleMix, seed: int
) -> tuple[list[Row], BuildReport]:
    """Rows in episode order with paths relative to `media_root`; the same seed gives the same rows.

    Windows are written to `media_root`/windows.
    """
    unknown = set(mix.tasks) - set(_BUILDERS)
    if unknown:
        raise ValueError(f"unknown tasks {sorted(unknown)}; choose from {sorted(_BUILDERS)}")
    build = _Build(mix, Path(media_root), np.random.default_rng(seed), BuildReport())
    rows = [row for episode in episodes for task in mix.tasks for row in _BUILDERS[task](episode, build)]
    build.report.rows.update(str(row["task"]) for row in rows)
    return rows, build.report


def write_split(folder: Path, out: Path, split: str, mix: SampleMix, seed: int) -> BuildReport:
    """Write `out`/`split`.jsonl from the episodes in `folder`, with all its media below `out`, where paths start."""
    read_episodes(folder)
    media = out / "media" / split
    shutil.copytree(folder, media / "episodes", dirs_exist_ok=True)
    rows, report = build_rows(read_episodes(media / "episodes"), media, mix, seed)
    if not rows:
        raise ValueError(f"{folder} gives no row of {', '.join(mix.tasks)} with views {', '.join(mix.views)}")
    lines = (json.dumps(_below(row, f"media/{split}")) + "\n" for row in rows)
    (out / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    return report


def _below(row: Row, folder: str) -> Row:
    moved = {"image": [f"{folder}/{path}" for path in row["image"]]}
    return row | moved | ({"mask": f"{folder}/{row['mask']}"} if "mask" in row else {})


def visible_point(view: View, name: str, centre: np.ndarray) -> tuple[np.ndarray | None, str]:
    """(u pixels, v pixels, z-depth of the centre) of an object, or None and the reason why it has none."""
    point = view.camera.project(centre)
    if not inside(point[:2], view.camera.size):
        return None, "outside the image"
    if name not in view.masks:
        return None, "hidden"
    if not view.mask(name)[pixel_index(point[:2], view.camera.size)]:
        return None, "centre covered by something nearer"
    return point, ""


def to_answer(point: np.ndarray, view: View) -> np.ndarray:
    """(u pixels, v pixels, metres) -> (0-1000, 0-1000, metres with three decimals)."""
    grid = pixels_to_grid(point[..., :2], view.camera.size)
    return np.concatenate([grid, np.round(point[..., 2:], 3)], axis=-1)


def _pointing(episode: Episode, build: _Build) -> Iterator[Row]:
    for sighting in _sightings(episode, build, "pointing"):
        answer = sighting.answer[:2].astype(int)
        question = prompts.pointing(sighting.target, build.rng)
        truth = {"points": {sighting.target: [answer.tolist()]}, "mask": sighting.mask}
        yield _row(sighting.key, [sighting.image], question, prompts.format_points(answer[None]), truth)


def _uvd(episode: Episode, build: _Build) -> Iterator[Row]:
    for sighting in _sightings(episode, build, "uvd"):
        question = prompts.locating(sighting.target, build.rng)
        answer = prompts.format_points_with_depth(sighting.answer[None])
        truth = {"points": {sighting.target: [_mixed(sighting.answer)]}, "mask": sighting.mask}
        yield _row(sighting.key, [sighting.image], question, answer, truth)


def _waypoints(episode: Episode, build: _Build) -> Iterator[Row]:
    """From each key frame but the last: the gripper now and at the key frames still to come."""
    keys = episode.key_frames()
    for start, index in enumerate(keys[:-1]):
        ahead = np.array([episode.frames[k].eef_position for k in keys[start:]])[:MOST_WAYPOINTS]
        for name, view in _views(episode.frames[index], build.mix.views):
            points = view.camera.project(ahead)
            if not inside(points[:, :2], view.camera.size).all():
                build.report.skipped["waypoints: outside the image"] += 1
                continue
            answer = to_answer(points, view)
            truth = {"points": {"end effector": [_mixed(point) for point in answer]}}
            key = RowKey("waypoints", f"{episode.name}_{index:02d}_{name}")
            image = _relative(view.image, build.media_root)
            question = prompts.waypoints(episode.instruction)
            yield _row(key, [image], question, prompts.format_points_with_depth(answer), truth)


def _hop(episode: Episode, build: _Build) -> Iterator[Row]:
    mix, rng = build.mix, build.rng
    states = sample_states(episode.key_frames())
    if any(view not in episode.frames[i].views for i in states for view in mix.hop_views):
        build.report.skipped[f"hop: a state lacks one of the views {', '.join(mix.hop_views)}"] += 1
        return
    zeros = rng.binomial(mix.hops_per_episode, mix.zero_hop_share)
    before, after, labels = balanced_pairs(len(states), mix.hops_per_episode - zeros, rng)
    pairs = list(zip(before.tolist(), after.tolist(), labels.tolist(), strict=True))
    pairs += [(p, p, 0.0) for p in rng.permutation(len(states))[:zeros].tolist()]
    phi = progress(len(states)).round(6).tolist()
    for p, q, label in pairs:
        slots, images = _hop_pictures(episode, states, (p, q), mix)
        truth = {"hop": round(label, 6), "progress": [phi[p], phi[q]]}
        key = RowKey("hop", f"{episode.name}_{states[p]:02d}_{states[q]:02d}")
        paths = [_relative(image, build.media_root) for image in images]
        yield _row(key, paths, prompts.hop(episode.instruction, slots), format_score(label), truth)


def _hop_pictures(
    episode: Episode, states: Sequence[int], pair: tuple[int, int], mix: SampleMix
) -> tuple[list[str], list[Path]]:
    shown = {"BEFORE": states[pair[0]], "AFTER": states[pair[1]]}
    if mix.hop_references:
        shown = {"REF-START": states[0], "REF-END": states[-1], **shown}
    slots = [f"{name} {view}" for name in shown for view in mix.hop_views]
    return slots, [episode.frames[i].views[view].image for i in shown.values() for view in mix.hop_views]


@dataclass(frozen=True)
class RowKey:
    task: str
    name: str
    """Unique among the rows of the task."""


@dataclass(frozen=True)
class _Sighting:
    """One object seen in one picture."""

    key: RowKey
    target: str
    image: str
    mask: str
    answer: np.ndarray


def _sightings(episode: Episode, build: _Build, task: str) -> Iterator[_Sighting]:
    for frame in episode.frames:
        for view_name, view in _views(frame, build.mix.views):
            for name, centre in frame.objects.items():
                point, reason = visible_point(view, name, centre)
                if point is None:
                    build.report.skipped[f"{task}: {reason}"] += 1
                    continue
                key = RowKey(task, f"{episode.name}_{frame.index:02d}_{view_name}_{name}")
                for shown_key, shown in _pictures(key, view, name, point, build):
                    image, mask = (_relative(path, build.media_root) for path in (shown.image, shown.masks[name]))
                    answer = to_answer(shown.camera.project(centre), shown)
                    yield _Sighting(shown_key, OBJECT_NAMES.get(name, name), image, mask, answer)


def _pictures(key: RowKey, view: View, name: str, point: np.ndarray, build: _Build) -> Iterator[tuple[RowKey, View]]:
    """The view itself, or random windows of it that hold the point."""
    mix = build.mix
    if mix.windows == 0:
        yield key, view
    for number in range(mix.windows):
        window = window_around(point[:2], view.camera.size, mix.window_side, build.rng)
        if window is None:
            build.report.skipped[f"{key.task}: too near the edge for a window"] += 1
            return
        stem = build.media_root / "windows" / key.task / f"{key.name}_{number}"
        yield RowKey(key.task, stem.name), cut(view, name, window, stem)


def _views(frame: Frame, names: Sequence[str]) -> list[tuple[str, View]]:
    return [(name, frame.views[name]) for name in names if name in frame.views]


def _row(key: RowKey, images: Sequence[str], question: str, answer: str, truth: Mapping[str, object]) -> Row:
    return {
        "id": f"{key.name}_{key.task}",
        "task": key.task,
        "image": list(images),
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
        "answer": answer,
        **truth,
    }


def _relative(path: Path, root: Path) -> str:
    try:
        return path.relative_to(root).as_posix()
    except ValueError as error:
        raise ValueError(f"{path} is outside the media root {root}; name a folder that holds the episodes") from error


def _mixed(point: np.ndarray) -> list[float]:
    return [int(point[0]), int(point[1]), round(float(point[2]), 3)]


_BUILDERS: Mapping[str, Callable[[Episode, _Build], Iterator[Row]]] = {
    "pointing": _pointing,
    "uvd": _uvd,
    "waypoints": _waypoints,
    "hop": _hop,
}
