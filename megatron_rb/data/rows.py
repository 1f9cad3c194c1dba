"""One line of a data file -> a conversation whose images and videos stand where they belong.

Two spellings are read: ShareGPT (`conversations` with `from` and `value`, `<image>` and `<video>` markers in the text,
paths in `image`, `images`, `video` or `videos`) and OpenAI (`messages` with `role` and `content`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rb.data.ground_truth import check_points, pixel_size
from megatron_rb.data.media_options import NO_OPTIONS, MediaOptions
from megatron_rb.data.problems import BadSample

ROLES = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
}  # fmt: skip
MARKER = re.compile(r"<(image|video)>")


@dataclass(frozen=True)
class MediaRef:
    """An image or video named by a row."""

    kind: str
    """`image` or `video`."""
    source: str | tuple[str, ...]
    """A file, a folder of frames, or the files of the frames."""
    fps: float | None = None
    """Frames per second of a folder or list of frames, when the row says so."""
    options: MediaOptions = NO_OPTIONS
    """How the row wants it resized, cut and sampled."""
    inline: bytes | None = None
    """The content itself, when the row brings it; `source` is then a name for messages."""


@dataclass(frozen=True)
class Turn:
    role: str
    """`system`, `user` or `assistant`."""
    parts: tuple[str | MediaRef, ...]
    """Text and media in reading order."""


@dataclass(frozen=True)
class Conversation:
    sample_id: str
    turns: tuple[Turn, ...]
    pixels_of: tuple[int, int] | None = None
    """(width, height) of the picture whose pixels the answer names; None when it names none, or places in 0-1000."""

    @property
    def media(self) -> tuple[MediaRef, ...]:
        """Images and videos in order of appearance."""
        return tuple(part for turn in self.turns for part in turn.parts if isinstance(part, MediaRef))


def parse_line(line: bytes, default_id: str, media_root: Path) -> Conversation:
    """Read one line of a jsonl file.

    Raises:
        BadSample: the line is not JSON, or not a conversation that can be trained on.
    """
    try:
        row = json.loads(line)
    except ValueError as error:
        raise BadSample("not JSON", f"the line is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise BadSample("not JSON", f"the line holds a {type(row).__name__}, not an object")
    return parse_row(row, default_id, media_root)


def parse_row(row: Mapping[str, Any], default_id: str, media_root: Path) -> Conversation:
    """Turn a row into a conversation; relative paths start at `media_root`.

    Raises:
        BadSample: unknown roles, no assistant turn, markers that do not match the media, a point outside its image.
    """
    check_points(row)
    stock = {"image": _Stock(row, "image", media_root), "video": _Stock(row, "video", media_root)}
    turns = tuple(Turn(role, tuple(_parts(content, stock))) for role, content in _spoken(row))
    for items in stock.values():
        items.check_used_up()
    if not any(turn.role == "assistant" for turn in turns):
        raise BadSample("no assistant turn", "the conversation has no assistant turn, so there is nothing to learn")
    return Conversation(str(row.get("id", default_id)), turns, pixel_size(row))


class _Stock:
    """The images or the videos of a row, handed out one marker after the other."""

    def __init__(self, row: Mapping[str, Any], kind: str, media_root: Path) -> None:
        self.kind = kind
        self.root = media_root
        self.items = [item for key in (kind, kind + "s") for item in _listed(row.get(key), kind)]
        self.fps = _rates(row, len(self.items)) if kind == "video" else [None] * len(self.items)
        self.markers = 0

    def next(self) -> MediaRef:
        self.markers += 1
        if self.markers > len(self.items):
            return MediaRef(self.kind, "")
        return self.refer(self.items[self.markers - 1], self.fps[self.markers - 1])

    def refer(self, item: Any, fps: float | None = None) -> MediaRef:
        if isinstance(item, str) and item:
            return MediaRef(self.kind, self._path(item), fps)
        if isinstance(item, list) and item and self.kind == "video" and all(isinstance(part, str) for part in item):
            return MediaRef(self.kind, tuple(map(self._path, item)), fps)
        raise BadSample("missing media", f"{self.kind} {item!r} is not a path")

    def _path(self, name: str) -> str:
        return str(self.root / name.removeprefix("file://"))

    def check_used_up(self) -> None:
        if self.markers != len(self.items):
            raise BadSample(
                "wrong marker count",
                f"the text has {self.markers} <{self.kind}> markers but the row names {len(self.items)} {self.kind}s",
            )


def _listed(value: Any, kind: str) -> list[Any]:
    if value is None:
        return []
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise BadSample("missing media", f"{kind} is a {type(value).__name__}; give a path or a list of paths")
    return value


def _rates(row: Mapping[str, Any], count: int) -> Sequence[float | None]:
    value = row.get("fps", row.get("video_fps"))
    rates = value if isinstance(value, list) else [value] * count
    if len(rates) != count or any(rate is not None and not _positive(rate) for rate in rates):
        raise BadSample("bad fps", f"fps {value!r} must be one positive number, or one for each of the {count} videos")
    return [None if rate is None else float(rate) for rate in rates]


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _spoken(row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Role and content of each turn."""
    turns, who, what = row.get("conversations"), "from", "value"
    if turns is None:
        turns, who, what = row.get("messages"), "role", "content"
    if not isinstance(turns, list) or not turns:
        raise BadSample("no conversation", "the row has neither conversations nor messages")
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict) or what not in turn:
            raise BadSample("no conversation", f"turn {number} is not an object with {who!r} and {what!r}")
        role = ROLES.get(str(turn.get(who)))
        if role is None:
            raise BadSample("unknown role", f"turn {number} is from {turn.get(who)!r}; use one of {', '.join(ROLES)}")
        if role == "system" and number > 0:
            raise BadSample("unknown role", f"turn {number} is a system turn; only the first may be one")
        yield role, turn[what]


def _parts(content: Any, stock: Mapping[str, _Stock]) -> Iterator[str | MediaRef]:
    if isinstance(content, str):
        yield from _marked(content, stock)
        return
    if not isinstance(content, list):
        raise BadSample("no conversation", f"content is a {type(content).__name__}; use text or a list of parts")
    for part in content:
        yield from _part(part, stock)


def _marked(text: str, stock: Mapping[str, _Stock]) -> Iterator[str | MediaRef]:
    for place, piece in enumerate(MARKER.split(text)):
        if place % 2:
            yield stock[piece].next()
        elif piece:
            yield piece


def _part(part: Any, stock: Mapping[str, _Stock]) -> Iterator[str | MediaRef]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        yield part["text"]
    elif kind in ("image", "image_url", "video", "video_url"):
        name = str(kind).removesuffix("_url")
        item = part.get(kind, part.get("path", part.get("url")))
        item = item.get("url") if isinstance(item, dict) else item
        yield stock[name].next() if item is None else stock[name].refer(item, _part_rate(part))
    else:
        raise BadSample("no conversation", f"content part {part!r} is not a text, image or video")


def _part_rate(part: Mapping[str, Any]) -> float | None:
    rate = part.get("fps")
    if rate is not None and not _positive(rate):
        raise BadSample("bad fps", f"fps {rate!r} must be a positive number")
    return None if rate is None else float(rate)
