"""The images or videos of a row, and how it wants them resized, cut and sampled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_rb.data.conversation import MediaRef
from megatron_rb.data.keys import FRAMES, SIZES, empty
from megatron_rb.data.media_names import find, listed
from megatron_rb.data.media_options import MediaOptions
from megatron_rb.data.numbers import AREA, RATE, SECONDS, SIDE, number, whole
from megatron_rb.data.numbers import FRAMES as FRAME_COUNTS
from megatron_rb.data.problems import BadSample, quoted

Read = tuple[str, Callable[[Any, str, tuple[float, float]], float | int | None], tuple[float, float]]
OPTIONS: dict[str, Read] = {
    "min_pixels": ("min_pixels", whole, AREA),
    "max_pixels": ("max_pixels", whole, AREA),
    "total_pixels": ("total_pixels", whole, AREA),
    "resized_height": ("resized_height", whole, SIDE),
    "resized_width": ("resized_width", whole, SIDE),
    "fps": ("fps", number, RATE),
    "nframes": ("nframes", whole, FRAME_COUNTS),
    "min_frames": ("min_frames", whole, FRAME_COUNTS),
    "max_frames": ("max_frames", whole, FRAME_COUNTS),
    "video_start": ("start", number, SECONDS),
    "video_end": ("end", number, SECONDS),
    "sample_fps": ("sample_fps", number, RATE),
    "raw_fps": ("raw_fps", number, RATE),
}
"""Key of a row -> field of `MediaOptions`, how it is read, and between what it must lie."""
EXCLUDING = ("fps", "nframes")


class MediaStock:
    """The images or the videos of a row, handed out one marker after the other."""

    def __init__(self, row: Mapping[str, Any], kind: str, root: Path) -> None:
        self.kind = kind
        self.root = root
        self.items = [item for key in (kind, kind + "s") for item in listed(row.get(key), kind)]
        self.wishes = _wishes(row, kind)
        self.markers = 0
        for key, value in self.wishes.items():
            if isinstance(value, list) and len(value) != len(self.items):
                raise BadSample(
                    _problem(key),
                    f"{key} {quoted(value)} must be one number, or one for each of {len(self.items)} {kind}s",
                )

    def next(self) -> MediaRef:
        """What the next marker stands for; its source is empty when the row names too few."""
        self.markers += 1
        if self.markers > len(self.items):
            return MediaRef(self.kind, "")
        number = self.markers - 1
        wishes = {key: value[number] if isinstance(value, list) else value for key, value in self.wishes.items()}
        return self._ref(self.items[number], wishes)

    def refer(self, item: Any, part: Mapping[str, Any]) -> MediaRef:
        """An image or video that a content part names itself; the part's wishes go before the row's."""
        own = _chosen(part, self.kind)
        common = {key: value for key, value in self.wishes.items() if not isinstance(value, list)}
        if any(key in own for key in EXCLUDING):
            common = {key: value for key, value in common.items() if key not in EXCLUDING}
        return self._ref(item, common | own)

    def check_used_up(self) -> None:
        """
        Raises:
            BadSample: markers and media of the row are not equally many.
        """
        if self.markers != len(self.items):
            raise BadSample(
                "wrong marker count",
                f"the text has {self.markers} <{self.kind}> markers but the row names {len(self.items)} {self.kind}s",
            )

    def _ref(self, item: Any, wishes: Mapping[str, Any]) -> MediaRef:
        named, options = find(item, self.kind, self.root), read_options(wishes)
        rate = options.sample_fps if options.sample_fps is not None else options.fps
        return MediaRef(self.kind, named.source, rate, options, named.inline)


def read_options(wishes: Mapping[str, Any]) -> MediaOptions:
    """Options from the keys of a row or content part.

    Raises:
        BadSample: a value is no number, or two contradict each other.
    """
    fields: dict[str, Any] = {OPTIONS[key][0]: OPTIONS[key][1](wishes[key], key, OPTIONS[key][2]) for key in wishes}
    options = MediaOptions(**fields)
    if options.fps is not None and options.nframes is not None:
        raise _contradiction(wishes, *EXCLUDING, why="give one of them")
    if (options.resized_height is None) != (options.resized_width is None):
        raise _contradiction(wishes, "resized_height", "resized_width", why="give both")
    for low, high in (("min_pixels", "max_pixels"), ("min_frames", "max_frames"), ("video_start", "video_end")):
        lower, upper = fields.get(OPTIONS[low][0]), fields.get(OPTIONS[high][0])
        if lower is not None and upper is not None and (lower > upper or (lower == upper and low == "video_start")):
            raise _contradiction(wishes, low, high, why=f"{high} must be above")
    return options


def _wishes(row: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Keys of the row for all its images or videos; those of `chat_template_kwargs` first."""
    more = row.get("chat_template_kwargs")
    if not empty(more) and not isinstance(more, Mapping):
        raise BadSample("key chat_template_kwargs", f"chat_template_kwargs is {quoted(more)}; it must be an object")
    given: Mapping[str, Any] = more if isinstance(more, Mapping) else {}
    odd = [key for key, value in given.items() if key not in OPTIONS and not empty(value)]
    if odd:
        known = ", ".join(OPTIONS)
        raise BadSample(
            "key chat_template_kwargs", f"chat_template_kwargs holds {quoted(odd)}; only these can be honoured: {known}"
        )
    return _chosen(given, kind) | _chosen(row, kind)


def _chosen(given: Mapping[str, Any], kind: str) -> dict[str, Any]:
    table = SIZES if kind == "image" else SIZES | FRAMES
    chosen = {key: given[key] for key in table if not empty(given.get(key))}
    if kind == "video" and "fps" not in chosen and not empty(given.get("video_fps")):
        chosen["fps"] = given["video_fps"]
    return chosen


def _problem(key: str) -> str:
    return "bad fps" if key.endswith("fps") else f"bad {key}"


def _contradiction(wishes: Mapping[str, Any], one: str, other: str, why: str) -> BadSample:
    values = f"{one} {quoted(wishes.get(one))} and {other} {quoted(wishes.get(other))}"
    return BadSample(_problem(one), f"{values} contradict each other: {why}")
