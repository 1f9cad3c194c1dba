"""Video files by PyAV: how many frames they give, when each is shown, and the pixels of some of them."""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from megatron_rb.data.problems import BadSample

Opened = Path | io.BytesIO
"""A file by its path, or its content."""

TURNS = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}
"""Counter-clockwise turns in degrees, as the display matrix of a file asks for them."""


@dataclass(frozen=True)
class VideoTrack:
    """What a video file shows."""

    height: int
    width: int
    """As a player shows it: after the turn of the display matrix."""
    frames: int
    """That decode."""
    fps: float
    """Mean rate, as the header says it."""
    stamps: tuple[float, ...] = ()
    """Seconds from the first frame to each frame; empty when frame n is shown at n / fps."""


def inspect_video_file(source: Opened, name: str) -> VideoTrack:
    """Look at the packets of a file and decode its first frame; all of it where packets do not tell what decodes.

    Raises:
        BadSample: it is no video, or not a frame of it decodes.
    """
    av = pyav(name)
    try:
        with av.open(_openable(source)) as container:
            if not container.streams.video:
                raise BadSample("unreadable media", f"{name} has no video in it")
            stream = container.streams.video[0]
            rate, tick = float(stream.average_rate or 0), Fraction(stream.time_base or 0)
            packets = [packet for packet in container.demux(stream) if packet.size]
            moments = _moments_of_packets(packets)
        if isinstance(source, io.BytesIO):
            source.seek(0)
        with av.open(_openable(source)) as container:
            frames = container.decode(video=0)
            first = next(frames)
            height, width = shown_size(first)
            if moments is None:
                moments = [first.pts, *(frame.pts for frame in frames)]
    except StopIteration:
        raise BadSample("unreadable media", f"no frame of {name} decodes") from None
    except (av.FFmpegError, TypeError, EOFError) as error:
        raise BadSample("unreadable media", f"{name} is not a readable video: {error}") from error
    return _track(height, width, moments, rate, tick, name)


def decode_video_file(
    source: Opened, name: str, numbers: Sequence[int], fps: float, stamps: Sequence[float]
) -> list[Image.Image]:
    """The frames with these numbers, turned as the display matrix says.

    Frames are decoded in one pass. A gap is jumped over where the file lists a key frame in it: a jump lands on the
    last one before its aim and decodes from there.

    Args:
        fps, stamps: as `VideoTrack` has them.

    Raises:
        BadSample: it does not decode, or a frame is not there.
    """
    av = pyav(name)
    wanted = sorted(set(numbers))
    found: dict[int, Image.Image] = {}
    try:
        for jumps in (True, False):
            if isinstance(source, io.BytesIO):
                source.seek(0)
            with av.open(_openable(source)) as container:
                reader = _Reader(container, fps, stamps, jumps)
                found = {number: turned(frame) for number, frame in reader.frames(wanted)}
            if len(found) == len(wanted):
                break
    except av.FFmpegError as error:
        raise BadSample("unreadable media", f"{name} does not decode: {error}") from error
    missing = [number for number in wanted if number not in found]
    if missing:
        raise BadSample("unreadable media", f"{name} ends before frame {missing[0]}")
    return [found[number] for number in numbers]


def pyav(name: str) -> Any:
    """The module `av`.

    Raises:
        ValueError: PyAV is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise ValueError(
            f"the video file {name} needs PyAV: install megatron-rb[video], or give a folder of frames"
        ) from error
    return av


def shown_size(frame: Any) -> tuple[int, int]:
    """Height and width of a frame after its turn."""
    return (frame.width, frame.height) if frame.rotation % 180 else (frame.height, frame.width)


def turned(frame: Any) -> Image.Image:
    """RGB image of a frame, turned as its display matrix says."""
    angle = frame.rotation % 360
    image = frame.to_image()
    if not angle:
        return image
    return image.transpose(TURNS[angle]) if angle in TURNS else image.rotate(angle, expand=True)


class _Reader:
    """Frames of an open container by number, forwards."""

    def __init__(self, container: Any, fps: float, stamps: Sequence[float], jumps: bool) -> None:
        self.container = container
        self.stream = container.streams.video[0]
        self.fps, self.stamps = fps, stamps
        self.key_frames = [entry.timestamp for entry in self.stream.index_entries if entry.is_keyframe] if jumps else []
        """When they are decoded, in ticks; empty where the file does not list them."""
        self.delay = 0
        """Ticks from the decoding of a key frame to its showing."""
        self.jumped = False
        """From the first jump on frames are told by their time stamps instead of counted."""

    def frames(self, wanted: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """Number and frame of each wanted one that is there."""
        left, number, origin = list(wanted), -1, None
        decoded = self.container.decode(self.stream)
        while left:
            frame = next(decoded, None)
            if frame is None:
                return
            if origin is None and frame.pts is not None:
                origin = frame.pts
                self.delay = max(0, origin - self.key_frames[0]) if self.key_frames else 0
            number = self._number(frame, origin) if self.jumped and origin is not None else number + 1
            if left[0] < number:  # a jump went too far
                return
            if left[0] == number:
                yield left.pop(0), frame
                if left and origin is not None and self._jump(frame.pts, self._ticks(left[0], origin)):
                    decoded = self.container.decode(self.stream)

    def _jump(self, here: int, aim: int) -> bool:
        """Go to the last key frame that is shown before the aim, when that lies ahead."""
        ahead = bisect_right(self.key_frames, aim - self.delay) > bisect_right(self.key_frames, here - self.delay)
        if ahead:
            self.jumped = True
            self.container.seek(aim - self.delay, backward=True, any_frame=False, stream=self.stream)
        return ahead

    def _ticks(self, number: int, origin: int) -> int:
        seconds = self.stamps[number] if self.stamps else number / self.fps
        return origin + round(seconds / self.stream.time_base)

    def _number(self, frame: Any, origin: int) -> int:
        seconds = float((frame.pts - origin) * self.stream.time_base)
        if self.stamps:
            return int(np.abs(np.asarray(self.stamps) - seconds).argmin())
        return round(seconds * self.fps)


def _openable(source: Opened) -> Any:
    return source if isinstance(source, io.BytesIO) else str(source)


def _moments_of_packets(packets: Sequence[Any]) -> list[int] | None:
    """Time stamps of the frames that will decode, in ticks and in the order of showing; None = only decoding tells.

    A clip that was cut without encoding it anew begins with packets that are there for decoding alone: its edit list
    marks them to be discarded.
    """
    shown = [packet for packet in packets if not packet.is_discard]
    strange = not packets or not packets[0].is_keyframe or any(packet.is_corrupt for packet in packets)
    if strange or any(packet.pts is None for packet in shown):
        return None
    return sorted(packet.pts for packet in shown)


def _track(height: int, width: int, moments: list[int], rate: float, tick: Fraction, name: str) -> VideoTrack:
    if any(moment is None for moment in moments):
        if rate <= 0:
            raise BadSample("bad fps", f"{name} says neither its rate nor the times of its frames")
        return VideoTrack(height, width, len(moments), rate)
    seconds = [float((moment - moments[0]) * tick) for moment in moments]
    if rate <= 0:
        if len(seconds) < 2 or seconds[-1] <= 0:
            raise BadSample("bad fps", f"{name} says no rate, and its {len(seconds)} frames show none")
        rate = (len(seconds) - 1) / seconds[-1]
    # Time stamps are whole ticks: a constant rate shows up to one tick of rounding.
    constant = all(abs(value - number / rate) <= tick + 1e-6 for number, value in enumerate(seconds))
    return VideoTrack(height, width, len(moments), rate, () if constant else tuple(seconds))
