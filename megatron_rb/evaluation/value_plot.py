"""Progress curves as pictures, with the frames of the episode below them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rb.data.hop_file import path_from, store_frames
from megatron_rb.data.media import load_picture
from megatron_rb.evaluation.value_scores import read_curves
from megatron_rb.value.episodes import KeyFramedEpisode, read_key_framed
from megatron_rb.value.label import cameras_of
from megatron_rb.value.reconstruct import METHODS

MOST_PICTURES = 16
"""Frames shown below the curves of an episode."""


def plot_episodes(file: Path, data: Path, out: Path) -> Iterator[Path]:
    """Draw every episode of a file of curves as `out`/<episode>.png; the pictures as they are done.

    Raises:
        ValueError: the curves name an episode or frames that the data does not hold; nothing is drawn then.
    """
    episodes = {item.name: item for item, _ in read_key_framed(data) if isinstance(item, KeyFramedEpisode)}
    curves = read_curves(file)
    for entry in curves:
        _check_frames(entry, episodes, file, data)
    out.mkdir(parents=True, exist_ok=True)
    for entry in curves:
        episode = episodes[entry["episode"]]
        camera = _first_camera(episode)
        store_frames(episode, [camera], set(entry["frames"]), out)
        pictures = [out / path_from(episode.images[camera][frame], data, out) for frame in entry["frames"]]
        plot_curves(entry, pictures, out / f"{episode.name}.png")
        yield out / f"{episode.name}.png"


def _check_frames(entry: Mapping[str, Any], episodes: Mapping[str, KeyFramedEpisode], file: Path, data: Path) -> None:
    episode = episodes.get(entry["episode"])
    if episode is None:
        raise ValueError(f"{file} names {entry['episode']}, which {data} does not hold")
    if not 0 <= min(entry["frames"]) <= max(entry["frames"]) < len(episode.images[_first_camera(episode)]):
        raise ValueError(f"{file} names frames of {episode.name} that {data} does not hold")


def _first_camera(episode: KeyFramedEpisode) -> str:
    return (cameras_of(episode) or tuple(episode.images))[0]


def plot_curves(entry: Mapping[str, Any], pictures: Sequence[Path], out: Path) -> None:
    """Draw the curves of one episode with its frames below, each under its place in time, as PNG.

    Args:
        entry: `EpisodeCurves.as_json()`.
        pictures: the front picture of each of `entry["frames"]`; a missing file leaves a gap, and of more than
            `MOST_PICTURES` evenly spaced ones are shown.
    """
    from matplotlib.figure import Figure

    frames = entry["frames"]
    shown = np.unique(np.linspace(0, len(frames) - 1, min(len(frames), MOST_PICTURES)).round().astype(int))
    figure = Figure(figsize=(max(7.0, 1.2 * len(shown) + 1), 5.4), dpi=100)
    grid = figure.add_gridspec(
        2, len(shown), height_ratios=[3, 1], wspace=0.05, hspace=0.28, left=0.07, right=0.98, top=0.9, bottom=0.02
    )
    axis = figure.add_subplot(grid[0, :])
    for method, values in entry["curves"].items():
        width = 3.0 if method == METHODS[0] else 1.2
        axis.plot(frames, values, marker=".", linewidth=width, label=f"{method} ({entry['voc'][method]:+.2f})")
    half = (frames[-1] - frames[0]) / (len(shown) - 1) / 2
    axis.set(ylim=(-0.03, 1.03), xlim=(frames[0] - half, frames[-1] + half), ylabel="progress", xlabel="frame")
    axis.set_xticks([frames[number] for number in shown])
    axis.grid(alpha=0.3)
    axis.set_title(
        f"{entry['episode']}: {entry['completion']}, VOC+ {entry['voc_plus']:+.2f}, VOC- {entry['voc_minus']:+.2f}, "
        f"{entry['unreadable']} of {entry['answers']} answers unreadable",
        fontsize=10,
    )
    axis.legend(fontsize=8, title="method (rank correlation with time)", title_fontsize=8, loc="upper left")
    for column, number in enumerate(shown):
        below = figure.add_subplot(grid[1, column])
        below.axis("off")
        if pictures[number].is_file():
            below.imshow(np.asarray(load_picture(pictures[number])))
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)
