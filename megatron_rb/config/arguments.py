"""The value of a `key=value` argument: texts as they were written, all else by Hydra's grammar."""

from __future__ import annotations

import dataclasses
import re
import typing
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from megatron_rb.config.written import NO_TEXT, declared_inside

FUNCTION = re.compile(r"\w+\(.*\)", re.DOTALL)
"""A call in Hydra's grammar, which for a text setting is a text like any other."""

NULL = "null"
BRACKETS: dict[type, tuple[str, str]] = {list: ("[", "]"), dict: ("{", "}")}
OPENING, CLOSING, QUOTES = "[{(", "]})", "'\""


def holds_text(declared: Any) -> bool:
    """Whether a setting of this type is a text, or a list, mapping or section with texts in it."""
    return declared is str or dataclasses.is_dataclass(declared) or any(map(holds_text, typing.get_args(declared)))


def read_argument(key: str, raw: str, declared: Any) -> Any:
    """What stands behind `key=`, as the declared type of the setting wants it.

    Lists are written `[a,b]`, mappings `{a: b}`; quotes keep commas, colons and spaces at the ends in a text.

    Raises:
        HydraException: a value that is no text cannot be read.
        ValueError: a null where a text belongs, or a sweep.
    """
    raw = raw.strip()
    if declared is str:
        return as_text(raw)
    if holds_text(declared) and not raw.startswith(BRACKETS[_kind(declared)][0]):
        return raw  # neither a list nor a mapping: said with an example where it is set
    inside = _inside(raw, _kind(declared)) if holds_text(declared) else None
    if inside is not None and _kind(declared) is list:
        return [read_argument(key, item, declared_inside(declared)) for item in inside]
    pairs = [_pair(item) for item in inside or []]
    if inside is None or None in pairs:
        return _by_grammar(key, raw)
    return {name: read_argument(key, value, declared_inside(declared, name)) for name, value in filter(None, pairs)}


def as_text(raw: str) -> str:
    """A text as it was written: without the quotes around it and the backslashes that Hydra's grammar asks for."""
    if raw == NULL:
        raise ValueError(NO_TEXT)
    try:
        override = OverridesParser.create().parse_override(f"key={raw}")
    except HydraException:
        return raw  # e.g. the bars of a layout, which Hydra's grammar refuses bare
    value = None if override.is_sweep_override() or FUNCTION.fullmatch(raw) else override.value()
    return value if isinstance(value, str) else raw


def alternatives(raw: str, declared: Any) -> list[str]:
    """The lists or mappings of a sweep, `[a],[b]`; one of them, or something else, is no sweep."""
    parts = split(raw, ",") or []
    opening, closing = BRACKETS[_kind(declared)]
    whole = all(part.strip().startswith(opening) and part.strip().endswith(closing) for part in parts)
    return [part.strip() for part in parts] if len(parts) > 1 and whole else [raw]


def split(text: str, separator: str, most: int = -1) -> list[str] | None:
    """Parts of a text between separators that stand outside of quotes and brackets; None = these do not match."""
    parts: list[str] = []
    start, quote, open_ones = 0, "", ""
    place = 0
    while place < len(text):
        sign = text[place]
        if sign == "\\":
            place += 1
        elif quote:
            quote = "" if sign == quote else quote
        elif sign in QUOTES and not text[start:place].strip(OPENING + " "):
            quote = sign  # elsewhere it is an apostrophe
        elif sign in OPENING:
            open_ones += CLOSING[OPENING.index(sign)]
        elif sign in CLOSING:
            if not open_ones.endswith(sign):
                return None
            open_ones = open_ones[:-1]
        elif sign == separator and not open_ones and most != len(parts):
            parts.append(text[start:place])
            start = place + 1
        place += 1
    return None if quote or open_ones else [*parts, text[start:]]


def _kind(declared: Any) -> type:
    return list if typing.get_origin(declared) is list else dict


def _inside(raw: str, kind: type) -> list[str] | None:
    """The items between the brackets of a list or mapping; None = it is none."""
    opening, closing = BRACKETS[kind]
    if len(raw) < 2 or not (raw.startswith(opening) and raw.endswith(closing)):
        return None
    items = split(raw[1:-1], ",")
    return [] if items is not None and not raw[1:-1].strip() else items


def _pair(item: str) -> tuple[str, str] | None:
    parts = split(item, ":", most=1)
    return (as_text(parts[0].strip()), parts[1]) if parts and len(parts) == 2 else None


def _by_grammar(key: str, raw: str) -> Any:
    override = OverridesParser.create().parse_override(f"{key}={raw}")
    if override.is_sweep_override():
        raise ValueError(f"'{key}={raw}' is a sweep; a run takes one value (a list is written [a,b])")
    return override.value()
