"""One object of JSON, as lines of evaluations hold it."""

from __future__ import annotations

import json
from typing import Any


def object_of(text: str) -> dict[str, Any]:
    """
    Raises:
        ValueError: the text is no JSON, is nested too deep, or holds something else than an object.
    """
    try:
        found = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deep to be read") from error
    return as_object(found)


def as_object(value: Any) -> dict[str, Any]:
    """A value that must be an object; ValueError where it is none."""
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, not an object")
    return value
