"""Speed of what is done per sample on one core: hop pairs, reconstruction, parsing, scoring of 3-D traces."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_rb.scores.trace3d import OrientedBox, build_scene, score_trace
from megatron_rb.spatial.answers import parse_box, parse_points, parse_points_with_depth
from megatron_rb.spatial.text_answers import parse_choice, parse_length
from megatron_rb.value.answers import parse_score
from megatron_rb.value.reconstruct import conservative
from megatron_rb.value.sampling import PairRules, episode_generator, sample_pairs


@dataclass(frozen=True)
class DataSpeed:
    name: str
    done: int
    unit: str
    cpu_seconds: float
    target: float
    """Units per second that are aimed at; for scenes the seconds that 100 may take."""

    @property
    def rate(self) -> float:
        """Units per second of CPU time of this process."""
        return self.done / self.cpu_seconds


def measure(seconds: float) -> list[DataSpeed]:
    """Every part for about `seconds` of CPU time each."""
    rng = np.random.default_rng(0)
    states = [np.cumsum(rng.integers(1, 30, size)).tolist() for size in (12, 40, 150, 600)]
    hops = rng.uniform(-1, 1, (3, 20_000)).tolist()
    points = [f"[({a}, {b}), ({b}, {a})]" for a, b in rng.integers(0, 1000, (500, 2))]
    traces = [f"[({a}, {b}, {a / 500 + 0.1:.3f}), ({b}, {a}, 1.005)]" for a, b in rng.integers(0, 1000, (500, 2))]
    scores = [f"<score>{a:+d}%</score>" for a in rng.integers(-100, 101, 500)]
    boxes = [f"[{a}, {b}, {a + 90}, {b + 90}]" for a, b in rng.integers(0, 900, (500, 2))]
    lengths = [f"{a / 10:.1f} cm" for a in rng.integers(1, 3000, 500)]
    choices = [f"The answer is {'ABCD'[a]}." for a in rng.integers(0, 4, 500)]
    room = _Room.drawn(rng)
    jobs: list[tuple[str, str, float, Callable[[int], int]]] = [
        ("hop pairs", "pairs", 100_000, lambda i: _pairs(states[i % 4], i)),
        ("reconstruction", "hops", 1_000_000, lambda i: len(conservative(*hops)) - 1),
        ("parsing points", "answers", 100_000, lambda i: len([parse_points(text) for text in points])),
        ("parsing traces", "answers", 100_000, lambda i: len([parse_points_with_depth(text) for text in traces])),
        ("parsing scores", "answers", 100_000, lambda i: len([parse_score(text) for text in scores])),
        ("parsing boxes", "answers", 100_000, lambda i: len([parse_box(text) for text in boxes])),
        ("parsing lengths", "answers", 100_000, lambda i: len([parse_length(text) for text in lengths])),
        ("parsing choices", "answers", 100_000, lambda i: len([parse_choice(text) for text in choices])),
        ("3-D trace scenes", "scenes", 100 / 60, lambda i: room.score()),
    ]
    return [_timed(name, unit, target, job, seconds) for name, unit, target, job in jobs]


def _timed(name: str, unit: str, target: float, job: Callable[[int], int], seconds: float) -> DataSpeed:
    job(0)
    start, done, turn = time.process_time(), 0, 0
    while time.process_time() - start < seconds:
        done += job(turn)
        turn += 1
    return DataSpeed(name, done, unit, time.process_time() - start, target)


def _pairs(states: list[int], number: int) -> int:
    return len(sample_pairs(states, PairRules(), episode_generator(0, str(number))))


@dataclass(frozen=True)
class _Room:
    """A scene of the benchmark's kind: a VGA depth picture of a room with a table, and an object of 15,000 pixels."""

    depth: np.ndarray
    mask: np.ndarray
    intrinsics: np.ndarray

    @classmethod
    def drawn(cls, rng: np.random.Generator) -> _Room:
        intrinsics = np.array([[500.0, 0, 320], [0, 500, 240], [0, 0, 1]])
        rows, columns = np.mgrid[:480, :640]
        across, down = (columns - 320) / 500, (rows - 240) / 500
        floor = np.where(down > 0, 1.3 / np.maximum(down, 1e-6), np.inf)
        side = np.where(across > 0, 2.0 / np.maximum(across, 1e-6), np.inf)
        table = np.where((down > 0.1) & (np.abs(across) < 0.5), 0.5 / np.maximum(down, 1e-6), np.inf)
        depth = np.minimum.reduce([floor, side, np.where(table < 3.0, table, np.inf), np.full(down.shape, 4.0)])
        mask = (np.abs(columns - 300) < 75) & (np.abs(rows - 270) < 50)
        depth = np.where(mask, 1.5 + 0.1 * across, depth) + rng.normal(0, 0.002, depth.shape)
        return cls(depth, mask, intrinsics)

    def score(self) -> int:
        """From pictures to the score: cloud, cleaning, occupied voxels, collisions of a trace of 8 points."""
        box = OrientedBox(np.array([0.3, 0, 2.2]), np.full(3, 0.2), np.eye(3))
        scene = build_scene(self.depth, self.mask, self.intrinsics, np.array([0, 0, 1.5]), box)
        score_trace(np.linspace([0, 0.1, 1.5], [0.3, 0, 2.2], 8), scene)
        return 1
