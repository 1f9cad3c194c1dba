"""Progress curves of episodes: which pairs to ask about, answers -> curves and VOC."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rb.data.hop_file import path_from, store_frames
from megatron_rb.data.json_object import object_of
from megatron_rb.data.problems import BadSample, refusing_the_unexpected
from megatron_rb.scores.value_metrics import evaluation_frames, spearman, voc_minus, voc_plus
from megatron_rb.value.answers import parse_score
from megatron_rb.value.episodes import BadEpisode, KeyFramedEpisode, read_key_framed
from megatron_rb.value.label import cameras_of, question_rows
from megatron_rb.value.reconstruct import METHODS, Consistency, completion, reconstruct


@dataclass(frozen=True)
class EpisodeCurves:
    episode: str
    frames: list[int]
    curves: dict[str, list[float]]
    """Method -> progress at each of the frames."""
    voc_plus: float
    voc_minus: float
    voc: dict[str, float]
    """Rank correlation with time of every curve."""
    unreadable: int
    """Answers that could not be read; they moved nothing."""
    answers: int
    completion: str
    reasons: dict[str, int]

    def as_json(self) -> dict[str, Any]:
        return dict(vars(self))


def asked_pairs(frames: Sequence[int]) -> dict[str, list[tuple[int, int]]]:
    """Pairs (before, after) by what they are for; T = len(frames) - 1 each."""
    later = list(frames[1:])
    return {
        "step": list(zip(frames[:-1], later, strict=True)),
        "swapped": list(zip(later, frames[:-1], strict=True)),
        "start": [(frames[0], frame) for frame in later],
        "goal": [(frames[-1], frame) for frame in later],
    }


def score_questions(
    data: Path, interval: int, folder: Path | None = None
) -> Iterator[tuple[KeyFramedEpisode, list[int], list[dict]] | BadEpisode]:
    """Every episode with the frames that are scored and one question per distinct pair.

    Args:
        interval: frames between two scored frames.
        folder: where paths of pictures start; frames of videos are written below it. None = the questions will not be
            asked, so no video is opened.
    """
    if interval < 1:
        raise ValueError(f"an interval of {interval} frames leads nowhere; give 1 or more")
    names: set[str] = set()
    for episode, _ in read_key_framed(data):
        if isinstance(episode, BadEpisode):
            yield episode
            continue
        if episode.name in names:
            reason = f"{data} has two episodes {episode.name}; their answers could not be told apart"
            yield BadEpisode(episode.name, "repeated episode", reason, str(data))
            continue
        names.add(episode.name)
        first = episode.key_frames[0]
        length = episode.key_frames[-1] - first + 1
        frames = [first + offset for offset in evaluation_frames(length, interval)]
        pairs = list(dict.fromkeys(pair for group in asked_pairs(frames).values() for pair in group))
        rows = question_rows(episode, pairs)
        if not isinstance(rows, BadEpisode) and folder is not None:
            rows = _with_pictures(episode, frames, rows, data, folder)
        yield rows if isinstance(rows, BadEpisode) else (episode, frames, rows)


def _with_pictures(
    episode: KeyFramedEpisode, frames: Sequence[int], rows: list[dict], data: Path, folder: Path
) -> list[dict] | BadEpisode:
    """The rows with paths that start at `folder`, where the frames of videos then lie."""
    try:
        with refusing_the_unexpected():
            store_frames(episode, cameras_of(episode) or (), {*frames, *episode.key_frames}, folder)
    except BadSample as error:
        return BadEpisode(episode.name, "unreadable video", str(error), str(data))
    return [row | {"image": [path_from(path, data, folder) for path in row["image"]]} for row in rows]


def curves_of(
    name: str, frames: Sequence[int], answers: Mapping[str, str], consistency: Consistency | None = None
) -> EpisodeCurves:
    """Rebuild the curves of one episode from answer texts by id (`<episode>_<before>_<after>`).

    A missing answer counts as unreadable.
    """
    hops: dict[str, list[float]] = {}
    reasons: Counter[str] = Counter()
    for kind, pairs in asked_pairs(frames).items():
        read = [parse_score(answers.get(f"{name}_{before:06d}_{after:06d}", "")) for before, after in pairs]
        hops[kind] = [answer.or_nan for answer in read]
        reasons.update(str(answer.problem) for answer in read if not answer.ok)
    args = (hops["step"], hops["start"], hops["goal"])
    curves = {method: reconstruct(method, *args, consistency) for method in METHODS}
    return EpisodeCurves(
        name,
        list(frames),
        {method: np.round(curve, 6).tolist() for method, curve in curves.items()},
        voc_plus(hops["step"]),
        voc_minus(hops["swapped"]),
        {method: spearman(curve) for method, curve in curves.items()},
        sum(reasons.values()),
        4 * (len(frames) - 1),
        completion(curves["conservative"]),
        dict(reasons),
    )


def read_curves(file: Path) -> list[dict[str, Any]]:
    """Lines that `rb value score` wrote.

    Raises:
        ValueError: a line is something else, or there is none.
    """
    fields = EpisodeCurves.__dataclass_fields__.keys()
    curves = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            entry = object_of(line)
        except ValueError as error:
            raise ValueError(f"{file}:{number} is no line of rb value score: {error}") from error
        missing = sorted(fields - entry.keys())
        if missing:
            raise ValueError(f"{file}:{number} lacks {', '.join(missing)}; rb value score writes such files")
        curves.append(entry)
    if not curves:
        raise ValueError(f"{file} is empty; rb value score writes a line per episode")
    return curves
