"""How large the samples of a data set are: pairs of text tokens and vision patches, and how often each occurs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

FORMAT = "megatron-rb sample histogram"
MOST_BINS = 4096
"""Pairs that are kept; above it sizes are rounded up until they fit."""


@dataclass(frozen=True)
class Histogram:
    """Sizes of samples; all arrays have one entry a bin."""

    text_tokens: np.ndarray
    """int64: tokens that do not stand for an image."""
    patches: np.ndarray
    """int64: vision patches."""
    frame_patches: np.ndarray
    """float64: patches that a patch sees where the ViT attends to whole frames, on average over the patches."""
    counts: np.ndarray
    """int64: samples."""
    source: str = ""
    """Where the figures come from, in words."""

    def __post_init__(self) -> None:
        lengths = {len(self.text_tokens), len(self.patches), len(self.frame_patches), len(self.counts)}
        if len(lengths) != 1:
            raise ValueError(f"a histogram has columns of different lengths: {sorted(lengths)}")
        if self.counts.sum() < 1 or min(self.text_tokens.min(), self.patches.min(), self.counts.min()) < 0:
            raise ValueError("a histogram needs at least one sample, and no negative size or count")

    @property
    def num_samples(self) -> int:
        return int(self.counts.sum())

    def tokens(self, merge_unit: int) -> np.ndarray:
        """Tokens of a sample in the language model: its text and one for `merge_unit` patches."""
        return self.text_tokens + self.patches // merge_unit

    def check(self, seq_length: int, max_patches: int, merge_unit: int) -> None:
        """
        Raises:
            ValueError: a sample is longer than a micro-batch may be.
        """
        for sizes, limit, name, what in (
            (self.tokens(merge_unit), seq_length, "seq_length", "tokens"),
            (self.patches, max_patches, "max_patches", "patches"),
        ):
            over = int(self.counts[sizes > limit].sum())
            if over:
                longest = int(sizes.max())
                raise ValueError(
                    f"{over} of {self.num_samples} samples of the histogram ({over / self.num_samples:.2%}) have more "
                    f"than {name} {limit} {what}; the longest has {longest}: use {name}={_nice(longest)}, or write the "
                    f"histogram with the limit of the run, which leaves them out as training does"
                )

    def draw(self, samples: int, random: np.random.Generator) -> np.ndarray:
        """Numbers of the bins of randomly drawn samples."""
        return random.choice(len(self.counts), size=samples, p=self.counts / self.counts.sum())

    def save(self, path: Path) -> None:
        """Write a json file, whole or not at all."""
        content = {
            "format": FORMAT,
            "version": 1,
            "source": self.source,
            "samples": self.num_samples,
            "text_tokens": self.text_tokens.tolist(),
            "patches": self.patches.tolist(),
            "frame_patches": [round(float(value), 1) for value in self.frame_patches],
            "counts": self.counts.tolist(),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(content))
        partial.replace(path)


def load_histogram(path: str | Path) -> Histogram:
    """Read what `save` wrote; `frame_patches` may be left out, each sample then counts as one image.

    Raises:
        ValueError: the file is missing, no JSON, or lacks a column.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no histogram {path}; `rb data stats` writes one")
    try:
        content = json.loads(path.read_text())
        columns = [np.asarray(content[name], dtype=np.int64) for name in ("text_tokens", "patches", "counts")]
        frames = np.asarray(content.get("frame_patches", content["patches"]), dtype=np.float64)
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is no histogram of samples ({error}); it is JSON with the lists text_tokens, patches and counts"
        ) from error
    text, patches, counts = columns
    try:
        return Histogram(text, patches, frames, counts, str(content.get("source", path)))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def histogram_of(text_tokens: np.ndarray, patches: np.ndarray, frame_patches: np.ndarray, source: str) -> Histogram:
    """Count samples; sizes are exact while there are at most `MOST_BINS` different ones, else rounded up."""
    step = 1
    while True:
        keys = np.stack([_up(np.asarray(text_tokens), step), _up(np.asarray(patches), 4 * step if step > 1 else 1)], 1)
        bins, place, counts = np.unique(keys, axis=0, return_inverse=True, return_counts=True)
        if len(bins) <= MOST_BINS:
            break
        step = 8 if step == 1 else 2 * step
    seen = np.bincount(place.reshape(-1), weights=np.asarray(frame_patches, dtype=np.float64), minlength=len(bins))
    return Histogram(bins[:, 0], bins[:, 1], seen / counts, counts, source)


def _up(values: np.ndarray, step: int) -> np.ndarray:
    return -(-values.astype(np.int64) // step) * step


def _nice(longest: int) -> int:
    return -(-longest // 1024) * 1024
