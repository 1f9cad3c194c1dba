"""Draw progress curves with the frames below, one PNG per episode."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_rb.data.hop_file import path_from, store_frames
from megatron_rb.evaluation.value_scores import plot_curves, read_curves
from megatron_rb.value.episodes import KeyFramedEpisode, read_key_framed
from megatron_rb.value.label import cameras_of


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="rb value plot", description=__doc__)
    parser.add_argument("--curves", required=True, help="what rb value score wrote")
    parser.add_argument("--data", required=True, help="the episodes")
    parser.add_argument("--out", required=True, help="folder for <episode>.png")
    options = parser.parse_args(argv)
    data, out = Path(options.data), Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    episodes = {item.name: item for item, _ in read_key_framed(data) if isinstance(item, KeyFramedEpisode)}
    for entry in read_curves(Path(options.curves)):
        if entry["episode"] not in episodes:
            raise ValueError(f"{options.curves} names {entry['episode']}, which {data} does not hold")
        episode = episodes[entry["episode"]]
        camera = (cameras_of(episode) or tuple(episode.images))[0]
        if not 0 <= min(entry["frames"]) <= max(entry["frames"]) < len(episode.images[camera]):
            raise ValueError(f"{options.curves} names frames of {episode.name} that {data} does not hold")
        store_frames(episode, [camera], set(entry["frames"]), out)
        pictures = [out / path_from(episode.images[camera][frame], data, out) for frame in entry["frames"]]
        plot_curves(entry, pictures, out / f"{entry['episode']}.png")
        print(out / f"{entry['episode']}.png")
    return 0
