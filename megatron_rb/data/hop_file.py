"""Key-framed episodes -> a jsonl file of hop samples with the pictures they name; one episode in memory at a time."""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Set
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from megatron_rb.data.conversation import MediaRef
from megatron_rb.data.ledger import Ledger
from megatron_rb.data.media import inspect_media, load_frames
from megatron_rb.data.problems import BadSample, refusing_the_unexpected
from megatron_rb.value.episodes import BadEpisode, KeyFramedEpisode, VideoFrames, read_key_framed
from megatron_rb.value.label import BLANK, LabelledEpisode, LabelRules, ReferencePool, hop_rows, label_episode

VIDEO_FPS = 30.0
"""For containers that do not tell their rate; frames are picked by number, so it decides nothing."""

DECODED = 256
"""Frames of a video in memory at a time."""


@dataclass
class HopFileReport:
    samples: int = 0
    episodes: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    """Episodes without samples, by problem; each is a line of the ledger."""


def write_hop_samples(
    data: Path, out: Path, rules: LabelRules, seed: int, *, part: tuple[int, int] = (0, 1), progress: bool = False
) -> HopFileReport:
    """Label every episode of `data` and write `out`, beside it the ledger `<out>.ledger.jsonl`.

    `out` appears when it is complete; until then the samples are in `<out>.partial`.

    Paths are written relative to the folder of `out`. Frames of videos are stored below it. A sample depends
    on the seed and its episode alone (with `reference_swap` on earlier episodes of the file too), so the parts of
    several processes together are what one would write.

    Args:
        part: (k, n): only every n-th episode, beginning with the k-th.

    Raises:
        ValueError: no episode gives a sample, or `part` is impossible.
    """
    if not 0 <= part[0] < part[1]:
        raise ValueError(f"part {part[0]} of {part[1]} does not exist; count from 0")
    out.parent.mkdir(parents=True, exist_ok=True)
    report, pool = HopFileReport(), ReferencePool()
    refusals, partial = out.with_suffix(".ledger.jsonl"), out.with_name(out.name + ".partial")
    refusals.unlink(missing_ok=True)
    with Ledger(refusals) as ledger, open(partial, "w", encoding="utf-8") as lines:
        for number, episode in enumerate(_shown(data, progress)):
            mine = number % part[1] == part[0]
            others = pool.of_task(episode) if rules.reference_swap and isinstance(episode, KeyFramedEpisode) else []
            if rules.reference_swap:
                _remember(pool, episode, out.parent)
            if not mine:
                continue
            labelled = _labelled(episode, rules, seed, data, out.parent)
            if isinstance(labelled, BadEpisode):
                report.refused[labelled.problem] += 1
                ledger.record("rejected", labelled.place, labelled.reason, id=labelled.name, problem=labelled.problem)
                continue
            report.episodes += 1
            for row in hop_rows(labelled, rules, seed, others):
                row["image"] = [path_from(path, data, out.parent) for path in row["image"]]
                lines.write(json.dumps(row) + "\n")
                report.samples += 1
    if not report.samples:
        partial.unlink()
        raise ValueError(_nothing(data, report, ledger.path))
    partial.replace(out)
    Image.new("RGB", (64, 64)).save(out.parent / BLANK)
    return report


def _nothing(data: Path, report: HopFileReport, ledger: Path) -> str:
    """Why there is no sample, in words."""
    if not report.refused:
        return f"{data} holds no episode for this part; give key-framed episodes, one frame per line"
    counts = ", ".join(f"{count} {problem}" for problem, count in report.refused.most_common())
    return f"no episode of {data} gives a sample: {counts}; see {ledger}"


def _labelled(
    episode: KeyFramedEpisode | BadEpisode, rules: LabelRules, seed: int, data: Path, folder: Path
) -> LabelledEpisode | BadEpisode:
    labelled = episode if isinstance(episode, BadEpisode) else label_episode(episode, rules, seed)
    if isinstance(labelled, BadEpisode):
        return labelled
    shown = {*labelled.pairs.before.tolist(), *labelled.pairs.after.tolist(), labelled.states[0], labelled.states[-1]}
    try:
        with refusing_the_unexpected():
            store_frames(labelled.episode, labelled.cameras, shown, folder)
    except BadSample as error:
        return BadEpisode(labelled.episode.name, "unreadable video", str(error), str(data))
    return labelled


def _remember(pool: ReferencePool, episode: KeyFramedEpisode | BadEpisode, folder: Path) -> None:
    """Offer an episode's first and last front picture to later ones, also when another part labels the episode."""
    if isinstance(episode, BadEpisode):
        return
    # An episode that fails here is refused, with its line in the ledger, by the part that labels it.
    with contextlib.suppress(BadSample), refusing_the_unexpected():
        store_frames(episode, list(episode.images)[:1], {episode.key_frames[0], episode.key_frames[-1]}, folder)
        pool.add(episode)


def _shown(data: Path, progress: bool):  # type: ignore[no-untyped-def]
    """Episodes, behind a bar that knows how much of the file has been read."""
    from rich.progress import Progress

    total = data.stat().st_size if data.is_file() else None
    with Progress(disable=not progress, transient=True) as bar:
        task = bar.add_task("episodes", total=total)
        for episode, read in read_key_framed(data):
            bar.update(task, completed=read)
            yield episode


def store_frames(episode: KeyFramedEpisode, cameras: Iterable[str], numbers: Set[int], folder: Path) -> None:
    """Write frames of videos as pictures below `folder`; those that are newer than their video are kept.

    Raises:
        BadSample: the video is missing, does not decode, or has too few frames.
    """
    for camera in set(cameras):
        frames = episode.images[camera]
        if not isinstance(frames, VideoFrames):
            continue
        missing = sorted(number for number in numbers if not _is_newer(folder / frames[number], frames.video))
        if not missing:
            continue
        ref = MediaRef("video", str(frames.video))
        info = inspect_media(ref, VIDEO_FPS)
        for start in range(0, len(missing), DECODED):
            part = missing[start : start + DECODED]
            for number, image in zip(part, load_frames(ref, info, part), strict=True):
                target = folder / frames[number]
                target.parent.mkdir(parents=True, exist_ok=True)
                image.save(target, quality=95)


def _is_newer(picture: Path, video: Path) -> bool:
    return picture.is_file() and video.is_file() and picture.stat().st_mtime >= video.stat().st_mtime


def path_from(path: str, data: Path, folder: Path) -> str:
    """A path as it is to be read from `folder`: frames and the blank picture lie there, others by the data."""
    if path == BLANK or path.startswith("frames/"):
        return path
    root = data.parent if data.is_file() else Path()
    return os.path.relpath(root / path, folder)
