"""Images and videos on disk: their sizes from the header, their pixels on demand."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

from megatron_rb.data.colours import ORIENTATION, DeepColours, eight_bit
from megatron_rb.data.conversation import MediaRef
from megatron_rb.data.patience import READ_SECONDS, answered
from megatron_rb.data.problems import BadSample
from megatron_rb.data.video_file import decode_video_file, inspect_video_file

FRAME_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


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
    stamps: tuple[float, ...] = ()
    """Seconds from the first frame of a video file to each frame; empty when frame n is shown at n / fps."""

    def seconds(self, number: int) -> float:
        """When a frame is shown, from the first one on."""
        return self.stamps[number] if self.stamps else number / self.fps


def inspect_media(ref: MediaRef, default_fps: float, read_seconds: float = READ_SECONDS) -> MediaInfo:
    """Size of an image or video without decoding it.

    Args:
        default_fps: rate of frames that lie there as images when nothing else says it.
        read_seconds: see `answered`.

    Raises:
        BadSample: a file is missing, is no image or video, or does not answer.
    """
    return answered(lambda: _inspect(ref, default_fps), _name(ref), read_seconds)


def load_image(ref: MediaRef, info: MediaInfo, read_seconds: float = READ_SECONDS) -> Image.Image:
    """Decoded RGB image, turned as its EXIF tag says, transparency on white.

    Raises:
        BadSample: it does not decode, does not answer, or has another size than `info` says.
    """
    image = answered(lambda: _decode(_source(ref), _name(ref)), _name(ref), read_seconds)
    _check_size(image, info, _name(ref))
    return image


def load_picture(path: str | Path) -> Image.Image:
    """A picture as a model is shown it before resizing: RGB of 8 bits, turned, transparency on white.

    Raises:
        BadSample: it is missing or does not decode.
    """
    return _decode(Path(path), str(path))


def shown_size(path: str | Path) -> tuple[int, int]:
    """Width and height of a picture as a model is shown it before resizing, from its header.

    Raises:
        BadSample: it is missing or no picture.
    """
    height, width = _image_size(Path(path), str(path))
    return width, height


def load_frames(
    ref: MediaRef, info: MediaInfo, numbers: Sequence[int], read_seconds: float = READ_SECONDS
) -> list[Image.Image]:
    """The frames of a video with these numbers.

    Raises:
        BadSample: a frame is missing, does not decode or answer, or has another size than `info` says.
    """
    images = answered(lambda: _decode_frames(ref, info, numbers), _name(ref), read_seconds)
    for image in images:
        _check_size(image, info, _name(ref))
    return images


def _inspect(ref: MediaRef, default_fps: float) -> MediaInfo:
    if ref.kind == "image":
        return MediaInfo(*_image_size(_source(ref), _name(ref)))
    frames = frame_files(ref)
    if not frames:
        track = inspect_video_file(_existing(ref), _name(ref))
        return MediaInfo(track.height, track.width, track.frames, track.fps, stamps=track.stamps)
    sizes = {_image_size(Path(frame), frame) for frame in frames}
    if len(sizes) > 1:
        raise BadSample("unequal frames", f"the frames of {_name(ref)} have {len(sizes)} different sizes")
    fps = _rate_of_row(ref) or _rate_beside(ref) or default_fps
    return MediaInfo(*sizes.pop(), frames=len(frames), fps=fps, given_frames=True)


def _decode_frames(ref: MediaRef, info: MediaInfo, numbers: Sequence[int]) -> list[Image.Image]:
    if not info.given_frames:
        return decode_video_file(_existing(ref), _name(ref), numbers, info.fps, info.stamps)
    files = frame_files(ref)
    if len(files) != info.frames:
        raise BadSample("changed media", f"{_name(ref)} has {len(files)} frames, it had {info.frames} when indexed")
    return [_decode(Path(files[number]), files[number]) for number in numbers]


def _rate_of_row(ref: MediaRef) -> float | None:
    """Rate of frames that lie there as images, as the row says it: of these frames before that of their video."""
    options = ref.options
    return options.sample_fps or options.fps or ref.fps or options.raw_fps


def frame_files(ref: MediaRef) -> list[str]:
    """Files of the frames in order; none for a video file."""
    if isinstance(ref.source, tuple):
        return list(ref.source)
    folder = Path(ref.source)
    if ref.inline is not None or not folder.is_dir():
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


def _source(ref: MediaRef) -> Path | io.BytesIO:
    """The file of an image or video, or the content that its row brings."""
    if ref.inline is not None:
        return io.BytesIO(ref.inline)
    if not isinstance(ref.source, str):
        raise BadSample("missing media", f"{ref.kind} {_name(ref)} is a list, not one file")
    return Path(ref.source)


def _existing(ref: MediaRef) -> Path | io.BytesIO:
    source = _source(ref)
    if isinstance(source, Path) and not source.exists():
        raise BadSample("missing media", f"no file or folder {source}")
    return source


def _image_size(source: Path | io.BytesIO, name: str) -> tuple[int, int]:
    """Height and width from the header."""
    try:
        with Image.open(source) as image:
            # For a PNG without the tag in its header, Pillow would decode the image to look for it at the end.
            tags = {} if image.format == "PNG" and "exif" not in image.info else image.getexif()
            turned = tags.get(ORIENTATION, 1) >= 5
            return (image.width, image.height) if turned else (image.height, image.width)
    except FileNotFoundError as error:
        raise BadSample("missing media", f"no file {name}") from error
    except Exception as error:  # Broken headers make Pillow raise nearly anything.
        raise BadSample("unreadable media", f"{name} is not a readable image: {_reason(error)}") from error


def _decode(source: Path | io.BytesIO, name: str) -> Image.Image:
    try:
        with Image.open(source) as image:
            return _rgb(ImageOps.exif_transpose(eight_bit(image)))
    except FileNotFoundError as error:
        raise BadSample("missing media", f"no file {name}") from error
    except DeepColours as error:
        raise BadSample("deep colours", f"{name} {error}") from error
    except Exception as error:  # Broken files make Pillow raise nearly anything.
        raise BadSample("unreadable media", f"{name} does not decode: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """What Pillow says, without the address of the object it read."""
    return re.sub(r"<_io\.BytesIO object at 0x[0-9a-f]+>", "its content", str(error))


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
