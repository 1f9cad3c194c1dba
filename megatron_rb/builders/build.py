"""Episodes -> rows of a training file: pointing, points and waypoints with depth, hops.

A row is a ShareGPT conversation with its ground truth beside it. What cannot be seen makes no row; it is counted.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rb.builders.episode_rows import EPISODE_BUILDERS
from megatron_rb.builders.episodes import Episode, View, scan_episodes
from megatron_rb.builders.rows import (
    MOST_WAYPOINTS,
    OBJECT_NAMES,
    Build,
    BuildReport,
    Row,
    RowKey,
    SampleMix,
    as_listed,
    build_row,
    pixel_truth,
    relative_path,
    seen_pixels,
    to_answer,
    to_pixels,
    views_of,
    visible_point,
)
from megatron_rb.builders.scene_rows import SCENE_BUILDERS
from megatron_rb.builders.trace_rows import TRACE_BUILDERS
from megatron_rb.builders.windows import cut, window_around
from megatron_rb.spatial import prompts
from megatron_rb.spatial.traces import key_points
from megatron_rb.value.answers import format_score
from megatron_rb.value.episodes import BadEpisode
from megatron_rb.value.hops import progress, sample_states
from megatron_rb.value.sampling import balanced_pairs

NEED_TIME = ("waypoints", "hop", "planning", "temporal_order", *TRACE_BUILDERS)
"""Tasks about the course of an episode, which a single picture has not."""


def build_rows(
    episodes: Sequence[Episode], media_root: Path, mix: SampleMix, seed: int
) -> tuple[list[Row], BuildReport]:
    """Rows in episode order with paths relative to `media_root`; the same seed gives the same rows.

    Windows are written to `media_root`/windows.
    """
    unknown = set(mix.tasks) - set(_BUILDERS)
    if unknown:
        raise ValueError(f"unknown tasks {sorted(unknown)}; choose from {sorted(_BUILDERS)}")
    build = Build(mix, Path(media_root), np.random.default_rng(seed), BuildReport())
    rows = [row for episode in episodes for task in mix.tasks for row in _rows_of(episode, task, build)]
    build.report.rows.update(str(row["task"]) for row in rows)
    return rows, build.report


def _rows_of(episode: Episode, task: str, build: Build) -> Iterator[Row]:
    if task in NEED_TIME and len(episode.key_frames()) < 2:
        build.report.skipped[f"{task}: fewer than two key frames"] += 1
        return
    yield from _BUILDERS[task](episode, build)


def write_split(folder: Path, out: Path, split: str, mix: SampleMix, seed: int) -> BuildReport:
    """Write `out`/`split`.jsonl from the episodes in `folder`, with all its media below `out`, where paths start.

    Episodes that cannot be used are counted in the report and are lines of `out`/`split`.refused.jsonl.

    Raises:
        ValueError: nothing gives a row.
    """
    if out.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{out} lies in {folder}, which is copied there; choose a folder elsewhere")
    refused = [episode for episode in scan_episodes(folder) if isinstance(episode, BadEpisode)]
    media = out / "media" / split
    shutil.copytree(folder, media / "episodes", dirs_exist_ok=True)
    usable = [episode for episode in scan_episodes(media / "episodes") if not isinstance(episode, BadEpisode)]
    rows, report = build_rows(usable, media, mix, seed)
    report.refused.update(episode.problem for episode in refused)
    if not rows:
        why = "".join(f"; {episode.reason} ({episode.place})" for episode in refused[:1])
        raise ValueError(f"{folder} gives no row of {', '.join(mix.tasks)} with views {', '.join(mix.views)}{why}")
    lines = (json.dumps(_below(row, f"media/{split}")) + "\n" for row in rows)
    (out / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    listed = out / f"{split}.refused.jsonl"
    listed.unlink(missing_ok=True)
    if refused:
        listed.write_text("".join(json.dumps(vars(episode)) + "\n" for episode in refused))
    return report


def _below(row: Row, folder: str) -> Row:
    moved = {"image": [f"{folder}/{path}" for path in row["image"]]}
    return row | moved | ({"mask": f"{folder}/{row['mask']}"} if "mask" in row else {})


def _pointing(episode: Episode, build: Build) -> Iterator[Row]:
    for sighting in _sightings(episode, build, "pointing"):
        if build.mix.version == "2.0":
            question = prompts.pointing(sighting.target, build.rng, prompts.POINTING_FORMAT_20)
            text = prompts.format_points(sighting.pixels[None])
            shown = {"points": sighting.pixel_truth, "mask": sighting.mask}
            yield build_row(sighting.key, [sighting.image], question, text, shown)
            continue
        answer = sighting.answer[:2].astype(int)
        question = prompts.pointing(sighting.target, build.rng)
        truth = {"points": {sighting.target: [answer.tolist()]}, "mask": sighting.mask}
        yield build_row(sighting.key, [sighting.image], question, prompts.format_points(answer[None]), truth)


def _uvd(episode: Episode, build: Build) -> Iterator[Row]:
    for sighting in _sightings(episode, build, "uvd"):
        question = prompts.locating(sighting.target, build.rng)
        answer = prompts.format_points_with_depth(sighting.answer[None])
        truth = {"points": {sighting.target: [as_listed(sighting.answer)]}, "mask": sighting.mask}
        yield build_row(sighting.key, [sighting.image], question, answer, truth)


def _waypoints(episode: Episode, build: Build) -> Iterator[Row]:
    """From each key frame but the last: the gripper now and at the key frames still to come; of more than eight those
    that say most about the way."""
    keys = episode.key_frames()
    for start, index in enumerate(keys[:-1]):
        ahead = np.array([episode.frames[k].eef_position for k in keys[start:]])
        if len(ahead) > MOST_WAYPOINTS:
            ahead = ahead[key_points(ahead, MOST_WAYPOINTS)]
        for name, view in views_of(episode.frames[index], build.mix.views):
            points, reason = seen_pixels(view.camera, ahead)
            if points is None:
                build.report.skipped[f"waypoints: {reason}"] += 1
                continue
            answer = to_answer(points, view)
            truth = {"points": {"end effector": [as_listed(point) for point in answer]}}
            key = RowKey("waypoints", f"{episode.name}_{index:02d}_{name}")
            image = relative_path(view.image, build.media_root)
            question = prompts.waypoints(episode.instruction)
            yield build_row(key, [image], question, prompts.format_points_with_depth(answer), truth)


def _hop(episode: Episode, build: Build) -> Iterator[Row]:
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
        paths = [relative_path(image, build.media_root) for image in images]
        yield build_row(key, paths, prompts.hop(episode.instruction, slots), format_score(label), truth)


def _hop_pictures(
    episode: Episode, states: Sequence[int], pair: tuple[int, int], mix: SampleMix
) -> tuple[list[str], list[Path]]:
    shown = {"BEFORE": states[pair[0]], "AFTER": states[pair[1]]}
    if mix.hop_references:
        shown = {"REF-START": states[0], "REF-END": states[-1], **shown}
    slots = [f"{name} {view}" for name in shown for view in mix.hop_views]
    return slots, [episode.frames[i].views[view].image for i in shown.values() for view in mix.hop_views]


@dataclass(frozen=True)
class _Sighting:
    """One object seen in one picture."""

    key: RowKey
    target: str
    image: str
    mask: str
    answer: np.ndarray
    """(0-1000, 0-1000, metres)."""
    pixels: np.ndarray
    """[2] whole pixels of the picture that a 2.0 model is shown."""
    pixel_truth: dict[str, Any]


def _sightings(episode: Episode, build: Build, task: str) -> Iterator[_Sighting]:
    for frame in episode.frames:
        for view_name, view in views_of(frame, build.mix.views):
            for name, centre in frame.objects.items():
                point, reason = visible_point(view, name, centre)
                if point is None:
                    build.report.skipped[f"{task}: {reason}"] += 1
                    continue
                key = RowKey(task, f"{episode.name}_{frame.index:02d}_{view_name}_{name}")
                for shown_key, shown in _pictures(key, view, name, point, build):
                    image, mask = (relative_path(path, build.media_root) for path in (shown.image, shown.masks[name]))
                    point = shown.camera.project(centre)
                    pixels = to_pixels(point[:2], shown, build.mix)
                    yield _Sighting(
                        shown_key,
                        OBJECT_NAMES.get(name, name),
                        image,
                        mask,
                        to_answer(point, shown),
                        pixels,
                        pixel_truth(pixels[None], shown, build.mix),
                    )


def _pictures(key: RowKey, view: View, name: str, point: np.ndarray, build: Build) -> Iterator[tuple[RowKey, View]]:
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


_BUILDERS: Mapping[str, Callable[[Episode, Build], Iterator[Row]]] = {
    "pointing": _pointing,
    "uvd": _uvd,
    "waypoints": _waypoints,
    "hop": _hop,
    **SCENE_BUILDERS,
    **TRACE_BUILDERS,
    **EPISODE_BUILDERS,
}
TASKS = frozenset(_BUILDERS)
"""Kinds of rows that can be built."""
