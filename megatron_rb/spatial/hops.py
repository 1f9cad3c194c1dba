"""Hop labels: progress of an episode aligned to its key frames, and relative progress between two states.

Source: Robo-Dopamine (arXiv 2512.23703), dense reward construction.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SCORE_BINS = 25


def sample_states(key_frames: Sequence[int], chunk: int = 1) -> list[int]:
    """Frame numbers s_0 .. s_M with the same count m = floor(floor(L / chunk) / N) in each of the N sub-tasks,
    so that progress i / M gives every sub-task an equal share.

    m is at least 1, and at most the shortest sub-task's frames: a frame never stands for two states.
    """
    segments = [(a, b) for a, b in zip(key_frames[:-1], key_frames[1:], strict=True)]
    if not segments or any(b <= a for a, b in segments):
        raise ValueError(f"key frames {list(key_frames)} must be at least two rising frame numbers")
    if chunk < 1:
        raise ValueError(f"chunk {chunk} must be at least 1 frame")
    length = key_frames[-1] - key_frames[0] + 1
    count = min(max(1, length // chunk // len(segments)), *(b - a for a, b in segments))
    inner = [round(a + (b - a) * k / count) for a, b in segments for k in range(count)]
    return [*inner, key_frames[-1]]


def progress(num_states: int) -> np.ndarray:
    """Phi(s_i) = i / M for M + 1 states."""
    if num_states < 2:
        raise ValueError(f"{num_states} states have no progress; an episode needs at least 2")
    return np.arange(num_states) / (num_states - 1)


def hop_label(before: float, after: float, start: float = 0.0, goal: float = 1.0) -> float:
    """H in [-1, 1] from two progress values: a gain relative to what was left, a loss relative to what was done."""
    if after >= before:
        if goal <= before:
            raise ValueError(f"no hop forward from progress {before:g}: the goal {goal:g} is reached")
        return (after - before) / (goal - before)
    return (after - before) / (before - start)


def hop_pairs(num_states: int, count: int, rng: np.random.Generator) -> list[tuple[int, int, float]]:
    """At most `count` distinct (before, after, label) with `after` != `before`, spread evenly over 25 label bins."""
    phi = progress(num_states)
    bins: list[list[tuple[int, int, float]]] = [[] for _ in range(SCORE_BINS)]
    for p in range(num_states):
        for q in range(num_states):
            if p != q:
                label = hop_label(phi[p], phi[q])
                bins[min(int((label + 1) / 2 * SCORE_BINS), SCORE_BINS - 1)].append((p, q, label))
    shuffled = [[members[i] for i in rng.permutation(len(members))] for members in bins]
    rounds = (members[k] for k in range(max(map(len, shuffled))) for members in shuffled if k < len(members))
    return [pair for pair, _ in zip(rounds, range(count), strict=False)]
