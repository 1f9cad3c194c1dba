"""The size to which Qwen-VL processors bring an image or video: whole merge blocks, area within limits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from megatron_rb.data.media_options import MediaOptions

MOST_ELONGATED = 200
"""Largest ratio of the sides that the processors of transformers take."""

QWEN_IMAGE_BLOCKS, QWEN_VIDEO_BLOCKS = (4, 16384), 128
"""Merge blocks that Qwen's tool allows an image at least and at most, and a video frame at least, by default."""


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


def image_target(height: int, width: int, rule: SizeRule, options: MediaOptions) -> tuple[int, int]:
    """Height and width of an image after resizing, as its row wishes: Qwen's `fetch_image`.

    Raises:
        ValueError: wishes that contradict each other, or sides that differ too much.
    """
    if _wished_size(options):
        return _exact(rule.factor, options)
    least, most = options.min_pixels or rule.min_pixels, options.max_pixels or rule.max_pixels
    return resized(height, width, _within(rule.factor, least, most, options))


def video_target(
    height: int, width: int, rule: SizeRule, frames: int, temporal_factor: int, options: MediaOptions
) -> tuple[int, int]:
    """Height and width of the frames of a video after resizing, as its row wishes: Qwen's `fetch_video`.

    A row's limits are those of one frame; the processor's own limit of all of them together holds as well.

    Raises:
        ValueError: wishes that contradict each other, sides that differ too much, or too few frames.
    """
    if _wished_size(options):
        return _exact(rule.factor, options)
    own = resized(height, width, rule, frames, temporal_factor)
    if options.min_pixels is None and options.max_pixels is None and options.total_pixels is None:
        return own
    least = options.min_pixels or (QWEN_VIDEO_BLOCKS * rule.factor**2 if rule.clip else rule.min_pixels)
    most = rule.max_pixels // frames if rule.clip else rule.max_pixels
    if options.total_pixels is not None:
        most = min(most, max(options.total_pixels * temporal_factor // frames, int(least * 1.05)))
    most = min(most, options.max_pixels or most)
    return resized(height, width, _within(rule.factor, least, most, options))


def _within(factor: int, least: int, most: int, options: MediaOptions) -> SizeRule:
    """The rule with both limits; one that the row does not state gives way to the one that it does."""
    if options.min_pixels is not None and options.max_pixels is not None and least > most:
        raise ValueError(f"min_pixels {least} is above max_pixels {most}")
    if least > most:
        least, most = (least, least) if options.max_pixels is None and options.total_pixels is None else (most, most)
    return SizeRule(factor, least, most)


def _wished_size(options: MediaOptions) -> bool:
    if (options.resized_height is None) != (options.resized_width is None):
        raise ValueError("resized_height and resized_width belong together; the row gives one of them")
    return options.resized_height is not None


def _exact(factor: int, options: MediaOptions) -> tuple[int, int]:
    """The size that a row states, in whole blocks, within the limits that Qwen's tool sets to it."""
    assert options.resized_height is not None and options.resized_width is not None
    least, most = (blocks * factor**2 for blocks in QWEN_IMAGE_BLOCKS)
    return resized(options.resized_height, options.resized_width, SizeRule(factor, least, most))
