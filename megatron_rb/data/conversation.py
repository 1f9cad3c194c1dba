"""A row after reading: turns with text and media in reading order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_rb.data.media_options import NO_OPTIONS, MediaOptions


@dataclass(frozen=True)
class MediaRef:
    """An image or video named by a row."""

    kind: str
    """`image` or `video`."""
    source: str | tuple[str, ...]
    """A file, a folder of frames, or the files of the frames; a short name for content that stands in the row."""
    fps: float | None = None
    """Frames per second of a folder or list of frames, when the row says so."""
    options: MediaOptions = NO_OPTIONS
    """How the row wants it resized, cut and sampled."""
    inline: bytes | None = None
    """The file itself, when the row holds it as a data URI."""


@dataclass(frozen=True)
class BoxRef:
    """A box or point of a picture, written as the model family writes it once the picture's sizes are known."""

    corners: tuple[float, ...]
    """x and y of a point, or of the upper left and the lower right corner."""
    image: int
    """Which picture of the conversation it lies in, from 0."""
    shares: bool = False
    """`corners` are shares of width and height, not pixels of the picture's file."""


@dataclass(frozen=True)
class NameRef:
    """A thing in a picture that the row names, written as the settings say."""

    name: str


@dataclass(frozen=True)
class Turn:
    role: str
    """`system`, `user`, `assistant` or `tool`."""
    parts: tuple[str | MediaRef | BoxRef | NameRef, ...]
    """Text, media, boxes and names in reading order."""
    learned: bool | None = None
    """What the row says about the loss on an assistant's turn; None = nothing."""
    reasoning: str | None = None
    """Thoughts of the assistant before what it says."""
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    """Functions that the assistant calls, `{"type": "function", "function": {"name", "arguments"}}` each."""
    names: tuple[tuple[str, str], ...] = ()
    """`name` and `tool_call_id`, for templates that write them."""


@dataclass(frozen=True)
class Conversation:
    sample_id: str
    turns: tuple[Turn, ...]
    pixels_of: tuple[int, int] | None = None
    """(width, height) of the picture whose pixels the answer names; None when it names none, or places in 0-1000."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """Functions that the assistant may call, as `{"type": "function", "function": {...}}`."""
    alone: bool = False
    """Only the last turn is learned, after the others as the template writes them when it is to be generated."""
    unread: tuple[str, ...] = ()
    """Keys of the row that mean nothing here, e.g. `turn.emotion`."""

    @property
    def media(self) -> tuple[MediaRef, ...]:
        """Images and videos in order of appearance."""
        return tuple(part for turn in self.turns for part in turn.parts if isinstance(part, MediaRef))

    def until(self, turn: int) -> Conversation:
        """A sample of its own for one assistant turn; later turns are cut off."""
        return replace(self, sample_id=f"{self.sample_id}#{turn}", turns=self.turns[: turn + 1], alone=True)
