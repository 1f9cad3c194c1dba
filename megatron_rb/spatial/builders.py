"""Episodes -> rows of a training file: pointing, points and waypoints with depth, hops.

A row is a ShareGPT conversation with its ground truth beside it. What cannot be seen makes no row; it is counted.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_rb.spatial import prompts
from megatron_rb.spatial.episodes import Episode, Frame, View, read_episodes
from megatron_rb.spatial.hops import hop_pairs, progress, sample_states
from megatron_rb.spatial.points import inside, pixel_index, pixels_to_grid

Row = dict[str, object]

OBJECT_NAMES = {"cube": "red cube", "cubeA": "red cube", "cubeB": "green cube"}
MOST_WAYPOINTS = 8
DEMO_TASKS = ("pointing", "uvd", "waypoints", "hop")


@dataclass(frozen=True)
class SampleMix:
    tasks: Sequence[str] = DEMO_TASKS
    """Which kinds of rows to build."""
    views: Sequence[str] = ("side",)
    """Cameras for pointing, uvd and waypoints; one row each."""
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


def build_rows(
    episodes: Sequence[Episode], media_root: Path, mix: SampleMix, seed: int
) -> tuple[list[Row], BuildReport]:
    """Rows in episode order with paths relative to `media_root`; the same seed gives the same rows."""
    unknown = set(mix.tasks) - set(_BUILDERS)
    if unknown:
        raise ValueError(f"unknown tasks {sorted(unknown)}; choose from {sorted(_BUILDERS)}")
    report = BuildReport()
    rng = np.random.default_rng(seed)
    rows = [
        row
        for episode in episodes
        for task in mix.tasks
        for row in _BUILDERS[task](episode, Path(media_root), mix, rng, report)
    ]
    report.rows.update(str(row["task"]) for row in rows)
    return rows, report


def write_split(folder: Path, out: Path, media_root: Path, mix: SampleMix, seed: int) -> BuildReport:
    """Build the rows of all episodes in a folder and write them as jsonl."""
    rows, report = build_rows(read_episodes(folder), media_root, mix, seed)
    if not rows:
        raise ValueError(f"{folder} gives no row of {', '.join(mix.tasks)} with views {', '.join(mix.views)}")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return report


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


def _pointing(
    episode: Episode, root: Path, mix: SampleMix, rng: np.random.Generator, report: BuildReport
) -> Iterator[Row]:
    for sighting in _sightings(episode, mix, "pointing", report):
        answer = sighting.answer[:2].astype(int)
        yield _row(
            f"{sighting.key}_pointing", "pointing", [sighting.view.image], root,
            prompts.pointing(sighting.target, rng), prompts.format_points(answer[None]),
            points={sighting.target: [answer.tolist()]}, mask=_relative(sighting.view.masks[sighting.name], root),
        )  # fmt: skip


def _uvd(
    episode: Episode, root: Path, mix: SampleMix, rng: np.random.Generator, report: BuildReport
) -> Iterator[Row]:
    for sighting in _sightings(episode, mix, "uvd", report):
        answer = sighting.answer
        yield _row(
            f"{sighting.key}_uvd", "uvd", [sighting.view.image], root,
            prompts.locating(sighting.target, rng), prompts.format_points_with_depth(answer[None]),
            points={sighting.target: [_mixed(answer)]}, mask=_relative(sighting.view.masks[sighting.name], root),
        )  # fmt: skip


def _waypoints(
    episode: Episode, root: Path, mix: SampleMix, rng: np.random.Generator, report: BuildReport
) -> Iterator[Row]:
    """From each key frame but the last: the gripper now and at the key frames still to come."""
    keys = episode.key_frames()
    for start, index in enumerate(keys[:-1]):
        ahead = np.array([episode.frames[k].eef_position for k in keys[start:]])[:MOST_WAYPOINTS]
        for name, view in _views(episode.frames[index], mix.views):
            points = view.camera.project(ahead)
            if not inside(points[:, :2], view.camera.size).all():
                report.skipped["waypoints: outside the image"] += 1
                continue
            answer = to_answer(points, view)
            yield _row(
                f"{episode.name}_{index:02d}_{name}_waypoints", "waypoints", [view.image], root,
                prompts.waypoints(episode.instruction), prompts.format_points_with_depth(answer),
                points={"end effector": [_mixed(point) for point in answer]},
            )  # fmt: skip


def _hop(
    episode: Episode, root: Path, mix: SampleMix, rng: np.random.Generator, report: BuildReport
) -> Iterator[Row]:
    seen = [i for i, frame in enumerate(episode.frames) if all(view in frame.views for view in mix.hop_views)]
    states = sample_states(episode.key_frames())
    if not set(states) <= set(seen):
        report.skipped[f"hop: a state lacks one of the views {', '.join(mix.hop_views)}"] += 1
        return
    zeros = rng.binomial(mix.hops_per_episode, mix.zero_hop_share)
    pairs = hop_pairs(len(states), mix.hops_per_episode - zeros, rng)
    pairs += [(p, p, 0.0) for p in rng.integers(len(states), size=zeros).tolist()]
    phi = progress(len(states))
    for p, q, label in pairs:
        slots, images = _hop_pictures(episode, states, (p, q), mix)
        yield _row(
            f"{episode.name}_{states[p]:02d}_{states[q]:02d}_hop", "hop", images, root,
            prompts.hop(episode.instruction, slots), prompts.format_score(label),
            hop=round(label, 6), progress=[round(float(phi[p]), 6), round(float(phi[q]), 6)],
        )  # fmt: skip


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
    """One object seen in one view."""

    key: str
    name: str
    target: str
    view: View
    answer: np.ndarray


def _sightings(episode: Episode, mix: SampleMix, task: str, report: BuildReport) -> Iterator[_Sighting]:
    for frame in episode.frames:
        for view_name, view in _views(frame, mix.views):
            for name, centre in frame.objects.items():
                point, reason = visible_point(view, name, centre)
                if point is None:
                    report.skipped[f"{task}: {reason}"] += 1
                    continue
                key = f"{episode.name}_{frame.index:02d}_{view_name}_{name}"
                yield _Sighting(key, name, OBJECT_NAMES.get(name, name), view, to_answer(point, view))


def _views(frame: Frame, names: Sequence[str]) -> list[tuple[str, View]]:
    return [(name, frame.views[name]) for name in names if name in frame.views]


def _row(
    sample_id: str, task: str, images: Sequence[Path], root: Path, question: str, answer: str, **truth: object
) -> Row:
    return {
        "id": sample_id,
        "task": task,
        "image": [_relative(image, root) for image in images],
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


_BUILDERS: Mapping[str, object] = {"pointing": _pointing, "uvd": _uvd, "waypoints": _waypoints, "hop": _hop}
