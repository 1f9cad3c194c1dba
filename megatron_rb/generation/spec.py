"""What the processes that generate answers agree on beside the settings: weights, sampling, questions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np

SPEC = "spec.json"


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Order as in transformers: temperature, then top-k, then top-p."""

    temperature: float = 0.0
    """0 = greedy: always the likeliest token."""
    top_p: float = 1.0
    """Fewest tokens that together have this probability; 1 = all."""
    top_k: int = 0
    """Likeliest tokens that may be drawn; 0 = all."""
    seed: int = 0
    """Draws depend on (seed, sample id) alone: on no batch, process or layout."""

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature {self.temperature:g} is negative; use 0 for greedy answers or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p:g} must be above 0 and at most 1")
        if self.top_k < 0:
            raise ValueError(f"top_k {self.top_k} is negative; use 0 for all tokens")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


@dataclass(frozen=True)
class BatchLimits:
    """How many prompts a rank answers side by side."""

    sequences: int = 16
    tokens: int = 32768
    """Of the prompts together; one longer prompt is a batch of its own."""
    patches: int = 65536

    def __post_init__(self) -> None:
        if min(self.sequences, self.tokens, self.patches) < 1:
            raise ValueError(f"a batch of {self.sequences} sequences holds nothing; use at least 1")


@dataclass(frozen=True)
class GenerationSpec:
    """What is asked in a generation run; its model, layout and kernels are the settings beside it."""

    weights: str
    """A checkpoint, or a Hugging Face folder."""
    questions: str
    """jsonl of rows whose last turn is an empty answer."""
    out: str
    """Answers file; each data-parallel rank appends to its own part beside it."""
    max_new_tokens: int
    sampling: Sampling = Sampling()
    limits: BatchLimits = BatchLimits()

    def write(self, folder: Path) -> None:
        (folder / SPEC).write_text(json.dumps(asdict(self), indent=1))

    @classmethod
    def read(cls, folder: Path) -> GenerationSpec:
        raw: dict[str, Any] = json.loads((folder / SPEC).read_text())
        kinds = {"sampling": Sampling, "limits": BatchLimits}
        return cls(**{name: kinds[name](**value) if name in kinds else value for name, value in raw.items()})


def part_file(out: Path, dp_rank: int) -> Path:
    """Where a data-parallel rank puts its answers until the run is over."""
    return out.with_suffix(f".part{dp_rank}.jsonl")


def parts_of(out: Path) -> list[Path]:
    """The parts that lie beside an answers file."""
    return sorted(out.parent.glob(f"{escape(out.stem)}.part*.jsonl"))


def scratch_folder(out: Path) -> Path:
    """Spec, index of the questions and logs of a generation run."""
    return out.with_suffix(".generation")


def plan_batches(sizes: np.ndarray, numbers: Sequence[int], limits: BatchLimits) -> list[list[int]]:
    """Prompts in batches, longest first, so that neighbours are alike and want of memory shows at once.

    Args:
        sizes: int `[samples, 2]`, tokens and patches.
        numbers: samples to answer.
    """
    batches: list[list[int]] = []
    tokens = patches = 0
    for number in sorted(numbers, key=lambda n: (-int(sizes[n, 0]), n)):
        own_tokens, own_patches = (int(size) for size in sizes[number])
        fits = batches and len(batches[-1]) < limits.sequences
        if not fits or tokens + own_tokens > limits.tokens or patches + own_patches > limits.patches:
            batches.append([])
            tokens = patches = 0
        batches[-1].append(number)
        tokens, patches = tokens + own_tokens, patches + own_patches
    return batches
