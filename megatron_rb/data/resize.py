"""The size to which Qwen-VL processors bring an image or video: whole merge blocks, area within limits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

MOST_ELONGATED = 200
"""Largest ratio of the sides that the processors of transformers take."""


@dataclass(frozen=True)
class SizeRule:
    """How large the result may be."""

    factor: int
    """Both sides become multiples of this many pixels: patch_size x merge_size."""
    min_pixels: int
    max_pixels: int
    """Limits of height x width; for a clip of height x width x frames."""
    clip: bool = False
    """Count pixels over all frames (Qwen3-VL videos) instead of within one frame."""


def resized(height: int, width: int, rule: SizeRule, frames: int = 1, temporal_factor: int = 1) -> tuple[int, int]:
    """Height and width after resizing; same result as `smart_resize` of transformers.

    Raises:
        ValueError: the sides differ too much, or a clip has fewer frames than one temporal patch.
    """
    factor = rule.factor
    if rule.clip:
        if frames < temporal_factor:
            raise ValueError(f"a video needs at least {temporal_factor} frames, this one has {frames}")
        enlarge = max(1.0, factor / height, factor / width)
        height, width = (int(height * enlarge), int(width * enlarge)) if enlarge > 1 else (height, width)
    else:
        frames = temporal_factor = 1
    if max(height, width) > MOST_ELONGATED * min(height, width):
        raise ValueError(f"{width} x {height} pixels is longer than {MOST_ELONGATED} times its short side")
    sides = (round(height / factor) * factor, round(width / factor) * factor)
    area = sides[0] * sides[1] * round(frames / temporal_factor) * temporal_factor
    if area > rule.max_pixels:
        shrink = math.sqrt(frames * height * width / rule.max_pixels)
        return _whole(height / shrink, factor, math.floor), _whole(width / shrink, factor, math.floor)
    if area < rule.min_pixels:
        grow = math.sqrt(rule.min_pixels / (frames * height * width))
        return _whole(height * grow, factor, math.ceil), _whole(width * grow, factor, math.ceil)
    return sides


def _whole(side: float, factor: int, rounding: Callable[[float], int]) -> int:
    return max(factor, rounding(side / factor) * factor)
