"""ms-swift's `objects`: names and boxes of pictures that stand for markers in the text.

As there, a box in pixels of its picture is scaled to the picture as the model sees it (Qwen2.5-VL), or to 0-1000
(Qwen3-VL), and rounded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_rb.data.conversation import BoxRef, NameRef, Turn
from megatron_rb.data.keys import empty
from megatron_rb.data.numbers import number
from megatron_rb.data.problems import BadSample, quoted

REF_MARKER, BOX_MARKER = "<ref-object>", "<bbox>"
BOX_TEXTS = ("tokens", "list")
BOX_TOKENS = ("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>")
FIELDS = ("ref", "bbox", "bbox_type", "image_id")
LARGEST = 1e6


class BoxStock:
    """Names and boxes of a row, handed out one marker after the other."""

    def __init__(self, row: Mapping[str, Any]) -> None:
        given = row.get("objects")
        self.given = not empty(given)
        objects = given if isinstance(given, Mapping) else {}
        if self.given and (not objects or objects.keys() - set(FIELDS)):
            raise BadSample("key objects", f"objects is {quoted(given)}; read is an object of {', '.join(FIELDS)}")
        self.names = [NameRef(_text(name)) for name in _list(objects, "ref")]
        self.boxes = _boxes(objects)
        self.used = {REF_MARKER: 0, BOX_MARKER: 0}

    def next(self, marker: str) -> NameRef | BoxRef:
        """What the next of these markers stands for."""
        items: Sequence[NameRef | BoxRef] = self.names if marker == REF_MARKER else self.boxes
        self.used[marker] += 1
        return items[self.used[marker] - 1] if self.used[marker] <= len(items) else NameRef(marker)

    def check_used_up(self) -> None:
        """
        Raises:
            BadSample: markers and names, or markers and boxes, are not equally many.
        """
        for marker, key, items in ((REF_MARKER, "ref", self.names), (BOX_MARKER, "bbox", self.boxes)):
            if self.used[marker] != len(items):
                raise BadSample(
                    "wrong marker count",
                    f"the text has {self.used[marker]} {marker} markers but objects.{key} holds {len(items)}",
                )


@dataclass(frozen=True)
class BoxWriter:
    """How a model family writes boxes."""

    thousandths: bool
    """0-1000 of width and height; false = pixels of the picture as the model sees it."""
    text: str = "tokens"
    """`tokens`: Qwen2-VL's special tokens, ms-swift's default; `list`: `[x1, y1, x2, y2]` as in Qwen's cookbooks."""

    def written(
        self, turns: Sequence[Turn], sizes: Sequence[tuple[int, int]], seen: Sequence[tuple[int, int]]
    ) -> tuple[Turn, ...]:
        """The turns with text in place of boxes.

        Args:
            sizes: (width, height) of every image of the conversation.
            seen: the same after resizing.
        """
        return tuple(replace(turn, parts=tuple(self._part(part, sizes, seen) for part in turn.parts)) for turn in turns)

    def _part(self, part: Any, sizes: Sequence[tuple[int, int]], seen: Sequence[tuple[int, int]]) -> Any:
        if isinstance(part, NameRef):
            return f"{BOX_TOKENS[0]}{part.name}{BOX_TOKENS[1]}" if self.text == "tokens" else part.name
        if not isinstance(part, BoxRef):
            return part
        if part.image >= len(sizes) and not (part.shares and self.thousandths):
            raise BadSample("key objects", f"objects has a box of image {part.image}, the row has {len(sizes)} images")
        width, height = (1, 1) if part.shares else sizes[part.image]
        if not all(0 <= value <= (height if place % 2 else width) for place, value in enumerate(part.corners)):
            unit = "shares of its sides (norm1)" if part.shares else f"pixels of its {width} x {height}"
            box = [f"{value:g}" for value in part.corners]
            raise BadSample("key objects", f"objects has the box {', '.join(box)} outside the picture, in {unit}")
        wide, high = (1000, 1000) if self.thousandths else seen[part.image]
        scaled = [
            round(value / (height if place % 2 else width) * (high if place % 2 else wide))
            for place, value in enumerate(part.corners)
        ]
        return self._write(scaled)

    def _write(self, corners: list[int]) -> str:
        if self.text == "list":
            return str(corners)
        points = (f"({x},{y})" for x, y in zip(corners[::2], corners[1::2], strict=True))
        return f"{BOX_TOKENS[2]}{','.join(points)}{BOX_TOKENS[3]}"


def _boxes(objects: Mapping[str, Any]) -> list[BoxRef]:
    boxes, kind = _list(objects, "bbox"), objects.get("bbox_type") or "real"
    if kind not in ("real", "norm1"):
        raise BadSample("key objects", f"objects.bbox_type is {quoted(kind)}; use real or norm1")
    images = _list(objects, "image_id") or [0] * len(boxes)
    if len(images) != len(boxes) or not all(type(image) is int and image >= 0 for image in images):
        raise BadSample(
            "key objects",
            f"objects.image_id is {quoted(images)}; give a picture's number for each of {len(boxes)} boxes",
        )
    return [BoxRef(_corners(box), image, kind == "norm1") for box, image in zip(boxes, images, strict=True)]


def _corners(box: Any) -> tuple[float, ...]:
    if not isinstance(box, list) or len(box) not in (2, 4):
        raise BadSample("key objects", f"objects.bbox holds {quoted(box)}; give [x, y] or [x1, y1, x2, y2]")
    values = [number(value, "objects.bbox", (-LARGEST, LARGEST)) for value in box]
    read = [value for value in values if value is not None]
    if len(read) != len(box):
        raise BadSample("key objects", f"objects.bbox holds {quoted(box)}; every coordinate must be a number")
    x, y = sorted(read[::2]), sorted(read[1::2])
    return tuple(value for pair in zip(x, y, strict=True) for value in pair)


def _list(objects: Mapping[str, Any], key: str) -> list[Any]:
    value = objects.get(key)
    if value is None:
        return []
    if not isinstance(value, list):
        raise BadSample("key objects", f"objects.{key} is {quoted(value)}; give a list")
    return value


def _text(name: Any) -> str:
    if not isinstance(name, str):
        raise BadSample("key objects", f"objects.ref holds {quoted(name)}; give text")
    return name
