"""Key-framed episodes -> hop samples: which frames, which pictures in the eight slots, question and answer."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

import numpy as np

from megatron_rb.value.answers import QUANTISATIONS, format_score
from megatron_rb.value.episodes import BadEpisode, KeyFramedEpisode, VideoFrames
from megatron_rb.value.hops import sample_states
from megatron_rb.value.prompts import SLOTS, hop_prompt
from megatron_rb.value.sampling import HopPairs, PairRules, episode_generator, sample_pairs

BLANK = "blank.png"
"""Stands for a picture that was left out."""
WORDS = ("front", "left wrist", "right wrist")
CAMERAS = (
    ("cam_high", "front", "side"),
    ("cam_left_wrist", "wrist"),
    ("cam_right_wrist", "wrist"),
)
"""Cameras for the three places front, left wrist and right wrist, best first; one that an episode lacks is replaced by
its front camera, as the released generator does for sets with one view."""


@dataclass(frozen=True)
class LabelRules:
    """How episodes become samples."""

    chunk: int = 20
    """Frames per state (the released script's value)."""
    chunk_rule: str = "paper"
    """See `sample_states`."""
    pairs: PairRules = field(default_factory=PairRules)
    quantisation: str = "percent"
    """`percent` (paper) or `tenths` (released)."""
    permuted_share: float = 0.287
    """Chance that a pair is shown a second time with its cameras in another order: 27.2 to 35 million samples."""
    view_dropout: float = 0.0
    """Chance that a wrist place shows a blank picture, in BEFORE and AFTER alike; the paper gives no number."""
    context_dropout: float = 0.0
    """Chance that a reference picture is blank, each of the two; the paper gives no number."""
    reference_swap: float = 0.0
    """Chance that a sample shows the reference pair of another episode of its task, so that the pair tells what start
    and goal look like and no more. The papers do not mention it; the released generator uses 0.75."""

    def __post_init__(self) -> None:
        for name in ("permuted_share", "view_dropout", "context_dropout", "reference_swap"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name):g} must lie between 0 and 1")
        if self.quantisation not in QUANTISATIONS:
            raise ValueError(f"quantisation '{self.quantisation}' is not known; use {' or '.join(QUANTISATIONS)}")


@dataclass(frozen=True)
class LabelledEpisode:
    """The pairs of an episode and what their rows need."""

    episode: KeyFramedEpisode
    states: tuple[int, ...]
    pairs: HopPairs
    cameras: tuple[str, str, str]
    """Camera of each of the three places."""


def label_episode(episode: KeyFramedEpisode, rules: LabelRules, seed: int) -> LabelledEpisode | BadEpisode:
    """Choose states and pairs; depends on nothing but the arguments."""
    try:
        states = sample_states(episode.key_frames, rules.chunk, rules.chunk_rule)
    except ValueError as error:
        return BadEpisode(episode.name, "unusable key frames", f"{episode.name}: {error}", episode.name)
    cameras = cameras_of(episode)
    if cameras is None:
        reason = f"{episode.name} has no camera with a picture of every frame; there are {', '.join(episode.images)}"
        return BadEpisode(episode.name, "no complete view", reason, episode.name)
    pairs = sample_pairs(states, rules.pairs, episode_generator(seed, episode.name, "pairs"))
    return LabelledEpisode(episode, tuple(states), pairs, cameras)


ReferencePair = tuple[str, str]
"""Front pictures of the start and the goal of an episode."""


class ReferencePool:
    """Reference pairs of the episodes before the present one, for `reference_swap`; its memory is bounded.

    Which pair a sample gets depends on the seed, its episode and the order of the file, on no process or part.
    """

    def __init__(self, capacity: int = 256) -> None:
        self._latest: deque[tuple[tuple[str, ...], ReferencePair]] = deque(maxlen=capacity)

    def of_task(self, episode: KeyFramedEpisode) -> list[ReferencePair]:
        """Pairs of other episodes of the same task, which is known by its instructions."""
        return [pair for instructions, pair in self._latest if instructions == episode.instructions]

    def add(self, episode: KeyFramedEpisode) -> None:
        """Remember an episode; one without a front camera gives no pair."""
        cameras = cameras_of(episode)
        if cameras is not None:
            front = episode.images[cameras[0]]
            self._latest.append((episode.instructions, (front[episode.key_frames[0]], front[episode.key_frames[-1]])))


def hop_rows(
    labelled: LabelledEpisode, rules: LabelRules, seed: int, others: Sequence[ReferencePair] = ()
) -> Iterator[dict[str, Any]]:
    """ShareGPT rows with eight pictures each, and the ground truth beside them: `hop`, `progress`, `frames`.

    Args:
        others: reference pairs that may be shown in place of the episode's own, see `LabelRules.reference_swap`.
    """
    episode, pairs = labelled.episode, labelled.pairs
    rng = episode_generator(seed, episode.name, "views")
    swaps = episode_generator(seed, episode.name, "references")
    values = (pairs.before.tolist(), pairs.after.tolist(), pairs.hop.tolist(), pairs.progress.tolist())
    for before, after, hop, both in zip(*values, strict=True):
        answer = format_score(hop, rules.quantisation)
        truth = {"hop": round(hop, 6), "progress": [round(phi, 6) for phi in both], "frames": [before, after]}
        orders: list[tuple[int, ...]] = [(0, 1, 2)]
        if rng.random() < rules.permuted_share:
            orders.append(_other_order(rng))
        for number, order in enumerate(orders):
            images, slots = _pictures(labelled, (before, after), order, rules, rng)
            if others and swaps.random() < rules.reference_swap:
                pair = others[int(swaps.integers(len(others)))]
                images[:2] = [own if own == BLANK else other for own, other in zip(images, pair, strict=False)]
            instruction = episode.instructions[int(rng.integers(len(episode.instructions)))]
            yield {
                "id": f"{episode.name}_{before:06d}_{after:06d}" + ("_permuted" if number else ""),
                "task": "hop",
                "episode": episode.name,
                "image": images,
                "conversations": [
                    {"from": "human", "value": hop_prompt(instruction, slots)},
                    {"from": "gpt", "value": answer},
                ],
                "answer": answer,
                **truth,
            }


def question_rows(episode: KeyFramedEpisode, pairs: Sequence[tuple[int, int]]) -> list[dict[str, Any]] | BadEpisode:
    """Rows without an answer for given pairs of frames; the reference pair is the first and the last frame.

    The `id` is `<episode>_<before>_<after>`, each with six digits; the same pair gives the same id.
    """
    cameras = cameras_of(episode)
    if cameras is None:
        reason = f"{episode.name} has no camera with a picture of every frame; there are {', '.join(episode.images)}"
        return BadEpisode(episode.name, "no complete view", reason, episode.name)
    nothing = np.zeros(0)
    ends = (episode.key_frames[0], episode.key_frames[-1])
    shown = LabelledEpisode(episode, ends, HopPairs(nothing, nothing, nothing, nothing.reshape(0, 2)), cameras)
    plain, rng = LabelRules(permuted_share=0.0), episode_generator(0, episode.name)
    rows = []
    for pair in pairs:
        images, slots = _pictures(shown, pair, (0, 1, 2), plain, rng)
        question = {"from": "human", "value": hop_prompt(episode.instructions[0], slots)}
        key = f"{episode.name}_{pair[0]:06d}_{pair[1]:06d}"
        rows.append({"id": key, "task": "hop", "episode": episode.name, "image": images, "conversations": [question]})
    return rows


def _pictures(
    labelled: LabelledEpisode, pair: tuple[int, int], order: Sequence[int], rules: LabelRules, rng: np.random.Generator
) -> tuple[list[str], tuple[str, ...]]:
    """Paths and names of the eight slots; a camera keeps its name wherever it stands."""
    images: Mapping[str, Sequence[str]] = labelled.episode.images
    dropped = {place for place in (1, 2) if rng.random() < rules.view_dropout}
    front = images[labelled.cameras[0]]
    ends = (labelled.states[0], labelled.states[-1])
    paths = [BLANK if rng.random() < rules.context_dropout else front[frame] for frame in ends]
    names = list(SLOTS[:2])
    for moment, frame in zip(("BEFORE", "AFTER"), pair, strict=True):
        for place in order:
            paths.append(BLANK if place in dropped else images[labelled.cameras[place]][frame])
            names.append(f"{moment} {WORDS[place]}")
    return paths, tuple(names)


def _other_order(rng: np.random.Generator) -> tuple[int, ...]:
    others = list(permutations(range(3)))[1:]
    return others[int(rng.integers(len(others)))]


def cameras_of(episode: KeyFramedEpisode) -> tuple[str, str, str] | None:
    """The cameras of the three places (see `CAMERAS`); None when no front camera has a picture of every frame."""
    complete = {
        camera for camera, paths in episode.images.items() if len(paths) > episode.key_frames[-1] and all(_used(paths))
    }
    front = next((camera for camera in CAMERAS[0] if camera in complete), None)
    if front is None:
        return None
    left, right = (next((camera for camera in wanted if camera in complete), front) for wanted in CAMERAS[1:])
    return front, left, right


def _used(paths: Sequence[str]) -> Sequence[str]:
    """What has to exist: a video has all its frames, of pictures every one is needed."""
    return ["video"] if isinstance(paths, VideoFrames) else paths
