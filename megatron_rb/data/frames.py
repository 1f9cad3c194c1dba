"""Which frames of a video are shown, and when: pure arithmetic with the results of transformers' processors, and of
Qwen's own tool for what a row may wish beside them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_rb.data.media import MediaInfo
from megatron_rb.data.media_options import MediaOptions
from megatron_rb.data.problems import BadSample


@dataclass(frozen=True)
class FrameRule:
    """How a video is sampled."""

    whole_patches: bool
    """The number of frames is a multiple of the temporal patch, and frames are taken at equal steps from the first;
    otherwise first and last are taken and any number in between."""
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
    if not rule.whole_patches:
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


@dataclass(frozen=True)
class Clip:
    """The part of a video that frames are taken from, by frame numbers of the whole."""

    first: int
    last: int

    @property
    def frames(self) -> int:
        return self.last - self.first + 1


def clip_of(info: MediaInfo, options: MediaOptions) -> Clip:
    """The frames between `start` and `end`, both ends included, rounded inwards as Qwen's tool does it.

    Raises:
        BadSample: there are none, or the frames lie there as images.
    """
    if options.start is None and options.end is None:
        return Clip(0, info.frames - 1)
    if info.given_frames:
        raise BadSample("bad clip", "video_start and video_end cut a video file; the row gives frames: leave some out")
    if info.stamps:
        first = int(np.searchsorted(info.stamps, options.start or 0.0, side="left"))
        last = info.frames - 1
        if options.end is not None:
            last = int(np.searchsorted(info.stamps, options.end, side="right")) - 1
    else:
        duration = info.frames / info.fps
        first = math.ceil(max(0.0, min(options.start or 0.0, duration)) * info.fps)
        end = duration if options.end is None else options.end
        last = min(math.floor(max(0.0, min(end, duration)) * info.fps), info.frames - 1)
    if first >= last:
        raise BadSample(
            "bad clip",
            f"between video_start {options.start} and video_end {options.end} there is no clip: the video has "
            f"{info.frames} frames in {info.seconds(info.frames - 1):g} s",
        )
    return Clip(first, last)


def sample_video(info: MediaInfo, options: MediaOptions, rule: FrameRule) -> list[int]:
    """Frame numbers taken from a video, as the row wishes and the recipe's rule says of all else.

    Raises:
        BadSample: the wishes contradict each other or the video.
    """
    if info.given_frames:
        _refuse_for_given_frames(options)
        return sample_given(info.frames, rule)
    clip = clip_of(info, options)
    if options.nframes is not None:
        return [clip.first + number for number in _spread(clip.frames, _asked_frames(options, clip, rule))]
    wished = replace(
        rule,
        fps=options.fps or rule.fps,
        min_frames=options.min_frames or rule.min_frames,
        max_frames=options.max_frames or rule.max_frames,
    )
    if wished.min_frames > wished.max_frames:
        raise BadSample("bad frames", f"min_frames {wished.min_frames} is above max_frames {wished.max_frames}")
    return [clip.first + number for number in sample_file(clip.frames, _mean_rate(info, clip), wished)]


def _asked_frames(options: MediaOptions, clip: Clip, rule: FrameRule) -> int:
    """`nframes`, rounded to whole temporal patches as Qwen's tool does it."""
    assert options.nframes is not None
    if options.fps is not None:
        raise BadSample("bad frames", f"the row asks for fps {options.fps:g} and nframes {options.nframes}; give one")
    depth = rule.temporal_patch_size
    count = round(options.nframes / depth) * depth
    if not depth <= count <= clip.frames:
        raise BadSample(
            "bad frames", f"nframes {options.nframes} must be from {depth} to the {clip.frames} frames of the video"
        )
    return count


def _refuse_for_given_frames(options: MediaOptions) -> None:
    for name in ("start", "end", "nframes", "min_frames", "max_frames"):
        if getattr(options, name) is not None:
            key = {"start": "video_start", "end": "video_end"}.get(name, name)
            raise BadSample("bad frames", f"{key} is for a video file; the row gives frames, which are all shown")


def _mean_rate(info: MediaInfo, clip: Clip) -> float:
    """Frames per second that sampling reckons with: the header's for a whole file, as in transformers."""
    if not info.stamps or clip.frames == info.frames:
        return info.fps
    return (clip.frames - 1) / (info.stamps[clip.last] - info.stamps[clip.first])


def shown_seconds(info: MediaInfo, numbers: Sequence[int], temporal_patch_size: int) -> list[float]:
    """Time of each temporal patch in seconds, by the time stamps of the file where its rate varies."""
    return _middles([info.seconds(number) for number in numbers], temporal_patch_size)


def shown_second_per_grid(info: MediaInfo, numbers: Sequence[int], clip: Clip, temporal_patch_size: int) -> float:
    """Seconds from one temporal patch to the next, on average where the rate varies."""
    if not info.stamps:
        return second_per_grid(numbers, clip.frames, info.fps, temporal_patch_size)
    duration = (info.stamps[clip.last] - info.stamps[clip.first]) * clip.frames / max(1, clip.frames - 1)
    return temporal_patch_size * duration / len(numbers)


def group_seconds(frames: Sequence[int], fps: float, temporal_patch_size: int) -> list[float]:
    """Time of each temporal patch in seconds: the middle between its first and its last frame."""
    return _middles([number / fps for number in frames], temporal_patch_size)


def _middles(times: Sequence[float], depth: int) -> list[float]:
    padded = [*times, *[times[-1]] * (-len(times) % depth)]
    return [(padded[i] + padded[i + depth - 1]) / 2 for i in range(0, len(padded), depth)]


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
