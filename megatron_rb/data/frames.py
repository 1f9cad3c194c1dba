"""Which frames of a video are shown, and when; pure arithmetic, same result as the processors of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_rb.data.problems import BadSample


@dataclass(frozen=True)
class FrameRule:
    """How a video is sampled."""

    family: str
    """`qwen2_5_vl` or `qwen3_vl`."""
    fps: float
    """Frames per second taken from a video file."""
    min_frames: int
    max_frames: int
    temporal_patch_size: int


def sample_file(total: int, fps: float, rule: FrameRule) -> list[int]:
    """Frame numbers taken from a file of `total` frames at `fps` frames per second.

    Raises:
        BadSample: the file has fewer frames than one temporal patch.
    """
    wanted = total / fps * rule.fps
    if rule.family == "qwen3_vl":
        count = min(max(int(wanted), rule.min_frames), rule.max_frames, total)
        _require_frames(count, rule)
        return _spread(total, count)
    depth = rule.temporal_patch_size
    most = min(rule.max_frames, total) // depth * depth
    count = int(min(max(wanted, rule.min_frames), most)) // depth * depth
    _require_frames(count, rule)
    return [number * total // count for number in range(count)]


def sample_given(total: int, rule: FrameRule) -> list[int]:
    """Frame numbers taken from frames that lie there as images: all of them, evenly thinned when there are too many.

    Raises:
        BadSample: fewer frames than one temporal patch.
    """
    count = min(total, rule.max_frames)
    _require_frames(count, rule)
    return _spread(total, count)


def group_seconds(frames: Sequence[int], fps: float, temporal_patch_size: int) -> list[float]:
    """Time of each temporal patch in seconds: the middle between its first and its last frame."""
    depth = temporal_patch_size
    padded = [*frames, *[frames[-1]] * (-len(frames) % depth)]
    return [(padded[i] / fps + padded[i + depth - 1] / fps) / 2 for i in range(0, len(padded), depth)]


def second_per_grid(frames: Sequence[int], total: int, fps: float, temporal_patch_size: int) -> float:
    """Seconds from one temporal patch to the next at the rate at which frames were taken."""
    return temporal_patch_size / (len(frames) / total * fps)


def _spread(total: int, count: int) -> list[int]:
    return np.linspace(0, total - 1, count).round().astype(int).tolist()


def _require_frames(count: int, rule: FrameRule) -> None:
    if count < rule.temporal_patch_size:
        raise BadSample(
            "too few frames",
            f"the video gives {count} frames, a temporal patch takes {rule.temporal_patch_size}; "
            f"use it as an image, or allow more frames",
        )
