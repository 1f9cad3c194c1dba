"""What a turn says -> text, media and boxes in reading order, thoughts, and calls."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_rb.data.boxes import BOX_MARKER, REF_MARKER, BoxStock
from megatron_rb.data.conversation import BoxRef, MediaRef, NameRef
from megatron_rb.data.keys import PART_KEYS, check_keys, empty
from megatron_rb.data.media_keys import MediaStock
from megatron_rb.data.problems import BadSample, quoted
from megatron_rb.data.tools import Function, read_calls

MEDIA_MARKER = re.compile(r"<(image|video)>")
ANY_MARKER = re.compile(rf"<(image|video)>|({REF_MARKER}|{BOX_MARKER})")
THOUGHTS = ("reasoning", "thinking")
MEDIA = {"image": "image", "image_url": "image", "video": "video", "video_url": "video"}
Part = str | MediaRef | BoxRef | NameRef


@dataclass
class Said:
    """One turn's content."""

    parts: list[Part] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    calls: list[Function] = field(default_factory=list)


class ContentReader:
    """Reads the turns of one row in order; its media and boxes are handed out to the markers."""

    def __init__(self, row: Mapping[str, Any], root: Path) -> None:
        self.stock = {kind: MediaStock(row, kind, root) for kind in ("image", "video")}
        self.boxes = BoxStock(row)
        self.unread: list[str] = []

    def read(self, content: Any) -> Said:
        """
        Raises:
            BadSample: a part is of no kind that is read.
        """
        said = Said()
        if isinstance(content, str):
            said.parts += self._marked(content)
            return said
        if content is None:
            return said
        if not isinstance(content, list):
            raise BadSample("no conversation", f"content is {quoted(content)}; use text or a list of parts")
        for part in content:
            self._add(part, said)
        return said

    def check_used_up(self) -> None:
        """
        Raises:
            BadSample: the row names other media or boxes than its text has markers for.
        """
        for stock in self.stock.values():
            stock.check_used_up()
        self.boxes.check_used_up()

    def _marked(self, text: str) -> Iterator[Part]:
        end = 0
        for marker in (ANY_MARKER if self.boxes.given else MEDIA_MARKER).finditer(text):
            if marker.start() > end:
                yield text[end : marker.start()]
            yield self.stock[marker[1]].next() if marker[1] else self.boxes.next(marker.group())
            end = marker.end()
        if end < len(text):
            yield text[end:]

    def _add(self, part: Any, said: Said) -> None:
        kind = _kind(part)
        self.unread += check_keys(part, PART_KEYS, "part") if isinstance(part, Mapping) else []
        value = None if kind is None else part.get(kind, part.get("value"))
        if kind in MEDIA and not empty(part.get("text")):
            raise BadSample(
                "key text", f"a part of type {kind} says text {quoted(part['text'])}; give a part of its own"
            )
        if kind == "text" and isinstance(value, str):
            said.parts.extend(self._marked(value) if self.boxes.given else [value] if value else [])
        elif kind in THOUGHTS and isinstance(value, str):
            said.thoughts.append(value)
        elif kind == "tool_call" and not empty(value):
            said.calls += read_calls(value, "tool_call")
        elif kind in MEDIA:
            said.parts.append(self._medium(MEDIA[str(kind)], value, part))
        else:
            kinds = ", ".join(("text", *MEDIA, *THOUGHTS, "tool_call"))
            raise BadSample("no conversation", f"content part {quoted(part)} is none of {kinds}")

    def _medium(self, kind: str, value: Any, part: Mapping[str, Any]) -> MediaRef:
        named = [item for item in (value, part.get("path"), part.get("url")) if not empty(item)]
        return self.stock[kind].refer(named[0], part) if named else self.stock[kind].next()


def _kind(part: Any) -> str | None:
    """The type of a part; Qwen's tool also takes parts without one, e.g. `{"image": "a.png"}`."""
    if not isinstance(part, Mapping):
        return None
    if part.get("type") is not None:
        return str(part["type"])
    return next((key for key in ("text", *MEDIA, *THOUGHTS) if key in part), None)
