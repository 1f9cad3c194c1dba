"""What a row may say of one image or video beyond its name: Qwen's keys for resizing, clipping and sampling."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MediaOptions:
    """Wishes of a row for one image or video; None = the processor's or the recipe's own value."""

    min_pixels: int | None = None
    """Smallest area after resizing, of an image or of one video frame."""
    max_pixels: int | None = None
    """Largest area after resizing, of an image or of one video frame."""
    total_pixels: int | None = None
    """Largest area of all sampled frames of a video together."""
    resized_height: int | None = None
    """Height after resizing, rounded to whole blocks; together with `resized_width`."""
    resized_width: int | None = None
    fps: float | None = None
    """Frames per second to sample from a video file; for frames that lie there as images, their rate."""
    nframes: int | None = None
    """Frames to sample from a video file; excludes `fps`."""
    min_frames: int | None = None
    max_frames: int | None = None
    start: float | None = None
    """Seconds from the begin of a video file at which the clip begins (`video_start`)."""
    end: float | None = None
    """Seconds from the begin of a video file at which the clip ends (`video_end`)."""
    sample_fps: float | None = None
    """Rate of frames that lie there as images; wins over `fps`."""
    raw_fps: float | None = None
    """Rate of the video that such frames were taken from; said by Qwen's tool beside `sample_fps`."""


NO_OPTIONS = MediaOptions()
