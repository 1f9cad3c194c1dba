"""What a row says where a picture or video is expected -> files, frames, or the content itself."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rb.data.keys import empty
from megatron_rb.data.problems import BadSample, quoted

SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
LONGEST_NAME = 255
"""Bytes of one part of a path, on the file systems in use."""
LONGEST_PATH = 4095
SOURCES = "read are files, folders and lists of frames, data URIs (data:image/png;base64,...) and file://"


@dataclass(frozen=True)
class Named:
    """Where an image or video is."""

    source: str | tuple[str, ...]
    inline: bytes | None = None


def listed(value: Any, kind: str) -> list[Any]:
    """The images or videos of a row's key; null, empty and lists of nothing else are none.

    Raises:
        BadSample: it is no path, object or list, or names some and leaves others empty.
    """
    items = value if isinstance(value, list) else [value]
    if all(map(_nothing, items)):
        return []
    if not isinstance(value, str | list | dict):
        raise BadSample("missing media", f"{kind} is a {type(value).__name__}; give a path or a list of paths")
    if any(map(_nothing, items)):
        raise BadSample("missing media", f"{kind} {list(map(_nothing, items)).index(True)} of {len(items)} is empty")
    return items


def find(item: Any, kind: str, root: Path) -> Named:
    """One image or video; relative paths start at `root`.

    Raises:
        BadSample: it is nothing that is read, or no file can have that name.
    """
    if isinstance(item, dict):
        item = _of_object(item, kind)
    if isinstance(item, str) and item.startswith("data:"):
        return _of_data_uri(item, kind)
    if isinstance(item, str) and item:
        return Named(_path(item, kind, root))
    if isinstance(item, list) and item and kind == "video":
        return Named(tuple(_frame(part, root) for part in item))
    raise BadSample("missing media", f"{kind} {quoted(item)} is not a path; {SOURCES}")


def _nothing(item: Any) -> bool:
    return empty(item) or (isinstance(item, dict) and all(map(empty, item.values())))


def _frame(item: Any, root: Path) -> str:
    found = find(item, "frame", root)
    if found.inline is not None:
        raise BadSample("key video", "a frame of a list is a data URI; store the frames as files, or the video as one")
    return str(found.source)


def _of_object(item: dict[str, Any], kind: str) -> Any:
    if not empty(item.get("bytes")):
        raise BadSample(
            "key bytes", f"{kind} is given by its key 'bytes'; write a file and name it in 'path'. {SOURCES}"
        )
    named = [item[key] for key in ("path", "url") if not empty(item.get(key))]
    if len(named) != 1:
        raise BadSample("missing media", f"{kind} {quoted(item)} has not one 'path' or 'url'; {SOURCES}")
    return named[0]


def _of_data_uri(uri: str, kind: str) -> Named:
    head, comma, payload = uri.partition(",")
    try:
        if not comma or not head.endswith(";base64"):
            raise ValueError("it is not data:TYPE;base64,CONTENT")
        content = base64.b64decode("".join(payload.split()), validate=True)
        if not content:
            raise ValueError("it is empty")
    except (ValueError, binascii.Error) as error:
        raise BadSample("bad data URI", f"{kind} {quoted(uri)} cannot be decoded: {error}") from error
    return Named(f"inline:{hashlib.sha256(content).hexdigest()[:16]}", content)


def _path(name: str, kind: str, root: Path) -> str:
    plain = name.removeprefix("file://")
    if SCHEME.match(plain):
        raise BadSample("URL", f"{kind} {quoted(name)} is a URL and is not fetched; {SOURCES}")
    path = str(root / plain)
    encoded = path.encode(errors="surrogatepass")
    if b"\0" in encoded or len(encoded) > LONGEST_PATH or max(map(len, encoded.split(b"/"))) > LONGEST_NAME:
        raise BadSample("missing media", f"no file can be named {kind} {quoted(name)}")
    return path
