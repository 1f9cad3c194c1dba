"""States of an episode, their progress, and the relative progress (hop) between two of them.

Source: Robo-Dopamine (arXiv 2512.23703), dense reward construction; RoboBrain 2.5 (arXiv 2601.14352) uses the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

CHUNK_RULES = ("paper", "released")


def sample_states(key_frames: Sequence[int], chunk: int = 1, rule: str = "paper") -> list[int]:
    """Frame numbers s_0 .. s_M with the same count m of states in each of the N sub-tasks, so that progress i / M gives
    every sub-task an equal share.

    m is at least 1, and at most the frames of the shortest sub-task: a frame never stands for two states.

    Args:
        key_frames: K_0 .. K_N, rising frame numbers.
        chunk: C, frames per state before they are shared out.
        rule: `paper`: m = floor(floor(L / C) / N) with L frames from K_0 to K_N. `released`: the published generator's
            m = round((K_N - K_0) / C / N).

    Raises:
        ValueError: fewer than two key frames, or they do not rise.
    """
    segments = [(a, b) for a, b in zip(key_frames[:-1], key_frames[1:], strict=True)]
    if not segments or any(b <= a for a, b in segments):
        raise ValueError(f"key frames {list(key_frames)} must be at least two rising frame numbers")
    if chunk < 1:
        raise ValueError(f"chunk {chunk} must be at least 1 frame")
    if rule not in CHUNK_RULES:
        raise ValueError(f"chunk rule '{rule}' is not known; use {' or '.join(CHUNK_RULES)}")
    span = key_frames[-1] - key_frames[0]
    wanted = (span + 1) // chunk // len(segments) if rule == "paper" else round(span / chunk / len(segments))
    count = min(max(1, wanted), *(b - a for a, b in segments))
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


def hop_labels(before: np.ndarray, after: np.ndarray, num_states: int) -> np.ndarray:
    """`hop_label` of many pairs of state numbers at once.

    Args:
        before, after: int arrays of one shape, 0 .. num_states - 1, different from each other in every place; so
            neither a hop forward from the last state nor one back from the first can occur.

    Returns:
        float64 of that shape in [-1, 1].
    """
    difference = after - before
    return difference / np.where(difference > 0, num_states - 1 - before, before)
