"""Images and videos on disk: their sizes from the header, their pixels on demand."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from megatron_rb.data.conversation import MediaRef
from megatron_rb.data.problems import BadSample

FRAME_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
ORIENTATION = 0x0112
"""EXIF tag; values from 5 on turn the image by 90 degrees."""


@dataclass(frozen=True)
class MediaInfo:
    """What the header of an image or video says."""

    height: int
    width: int
    frames: int = 0
    """0 for an image."""
    fps: float = 0.0
    given_frames: bool = False
    """The video lies there as images, already sampled."""


def inspect_media(ref: MediaRef, default_fps: float) -> MediaInfo:
    """Size of an image or video without decoding it.

    Args:
        default_fps: rate of frames that lie there as images when nothing else says it.

    Raises:
        BadSample: a file is missing or is no image or video.
    """
    if ref.kind == "image":
        return MediaInfo(*_image_size(_one_file(ref)))
    frames = frame_files(ref)
    if not frames:
        return _inspect_video_file(_one_file(ref))
    sizes = {_image_size(Path(frame)) for frame in frames}
    if len(sizes) > 1:
        raise BadSample("unequal frames", f"the frames of {_name(ref)} have {len(sizes)} different sizes")
    fps = ref.fps or _rate_beside(ref) or default_fps
    return MediaInfo(*sizes.pop(), frames=len(frames), fps=fps, given_frames=True)


def load_image(ref: MediaRef, info: MediaInfo) -> Image.Image:
    """Decoded RGB image, turned as its EXIF tag says, transparency on white.

    Raises:
        BadSample: it does not decode, or has another size than `info` says.
    """
    image = _decode(_one_file(ref))
    _check_size(image, info, _name(ref))
    return image


def load_frames(ref: MediaRef, info: MediaInfo, numbers: Sequence[int]) -> list[Image.Image]:
    """The frames of a video with these numbers.

    Raises:
        BadSample: a frame is missing, does not decode, or has another size than `info` says.
    """
    if info.given_frames:
        files = frame_files(ref)
        if len(files) != info.frames:
            raise BadSample("changed media", f"{_name(ref)} has {len(files)} frames, it had {info.frames} when indexed")
        images = [_decode(Path(files[number])) for number in numbers]
    else:
        images = _decode_video_file(_one_file(ref), numbers)
    for image in images:
        _check_size(image, info, _name(ref))
    return images


def frame_files(ref: MediaRef) -> list[str]:
    """Files of the frames in order; none for a video file."""
    if isinstance(ref.source, tuple):
        return list(ref.source)
    folder = Path(ref.source)
    if not folder.is_dir():
        return []
    files = [str(path) for path in folder.iterdir() if path.suffix.lower() in FRAME_SUFFIXES]
    if not files:
        raise BadSample("missing media", f"the folder {folder} holds no frames ({', '.join(FRAME_SUFFIXES)})")
    return sorted(files, key=_natural)


def _natural(name: str) -> list[tuple[int, str]]:
    """`frame2` before `frame10`."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


def _name(ref: MediaRef) -> str:
    return ref.source if isinstance(ref.source, str) else f"{ref.source[0]} and {len(ref.source) - 1} more"


def _one_file(ref: MediaRef) -> Path:
    if not isinstance(ref.source, str):
        raise BadSample("missing media", f"{ref.kind} {_name(ref)} is a list, not one file")
    return Path(ref.source)


def _image_size(path: Path) -> tuple[int, int]:
    """Height and width from the header."""
    try:
        with Image.open(path) as image:
            # For a PNG without the tag in its header, Pillow would decode the image to look for it at the end.
            tags = {} if image.format == "PNG" and "exif" not in image.info else image.getexif()
            turned = tags.get(ORIENTATION, 1) >= 5
            return (image.width, image.height) if turned else (image.height, image.width)
    except FileNotFoundError as error:
        raise BadSample("missing media", f"no file {path}") from error
    except Exception as error:  # Broken headers make Pillow raise nearly anything.
        raise BadSample("unreadable media", f"{path} is not a readable image: {error}") from error


def _decode(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return _rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError as error:
        raise BadSample("missing media", f"no file {path}") from error
    except Exception as error:  # Broken files make Pillow raise nearly anything.
        raise BadSample("unreadable media", f"{path} does not decode: {error}") from error


def _rgb(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def _check_size(image: Image.Image, info: MediaInfo, name: str) -> None:
    if (image.height, image.width) != (info.height, info.width):
        raise BadSample(
            "changed media",
            f"{name} is {image.width} x {image.height}, it was {info.width} x {info.height} when indexed",
        )


def _rate_beside(ref: MediaRef) -> float | None:
    """`fps` of the json file beside a folder of frames: `clip/` and `clip.json`."""
    file = Path(f"{ref.source}.json") if isinstance(ref.source, str) else None
    if file is None or not file.is_file():
        return None
    try:
        rate = float(json.loads(file.read_text(encoding="utf-8"))["fps"])
    except (ValueError, KeyError, TypeError) as error:
        raise BadSample("bad fps", f"{file} has no number `fps`") from error
    if rate <= 0:
        raise BadSample("bad fps", f"{file} says fps {rate:g}; it must be above 0")
    return rate


def _pyav(path: Path) -> Any:
    try:
        import av
    except ImportError as error:
        raise ValueError(
            f"the video file {path} needs PyAV: install megatron-rb[video], or give a folder of frames"
        ) from error
    return av


def _inspect_video_file(path: Path) -> MediaInfo:
    if not path.is_file():
        raise BadSample("missing media", f"no file or folder {path}")
    av = _pyav(path)
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            fps = float(stream.average_rate)
            # Some containers do not say how many frames they hold.
            frames = stream.frames or sum(1 for packet in container.demux(stream) if packet.size)
            return MediaInfo(stream.codec_context.height, stream.codec_context.width, frames, fps)
    except (av.FFmpegError, IndexError, TypeError) as error:
        raise BadSample("unreadable media", f"{path} is not a readable video: {error}") from error


def _decode_video_file(path: Path, numbers: Sequence[int]) -> list[Image.Image]:
    av = _pyav(path)
    wanted, found = set(numbers), {}
    try:
        with av.open(str(path)) as container:
            for number, frame in enumerate(container.decode(video=0)):
                if number in wanted:
                    found[number] = frame.to_image()
                if len(found) == len(wanted):
                    break
    except av.FFmpegError as error:
        raise BadSample("unreadable media", f"{path} does not decode: {error}") from error
    missing = sorted(wanted - found.keys())
    if missing:
        raise BadSample("unreadable media", f"{path} ends before frame {missing[0]}")
    return [found[number] for number in numbers]
