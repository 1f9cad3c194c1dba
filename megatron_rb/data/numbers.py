"""Numbers that a row says, within what can be meant; JSON holds 1e400, which is infinite, and 1e-300 as well."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megatron_rb.data.problems import BadSample, quoted

RATE = (1e-4, 1e4)
"""Frames per second: one in three hours, to a high-speed camera."""
SECONDS = (0.0, 1e7)
FRAMES = (1, 10**7)
AREA = (1, 10**10)
SIDE = (1, 10**6)


def number(value: Any, key: str, limits: tuple[float, float]) -> float | None:
    """A finite number within limits; None for null.

    Raises:
        BadSample: it is something else; the message names key and value.
    """
    if value is None:
        return None
    ok = isinstance(value, int | float) and not isinstance(value, bool) and limits[0] <= value <= limits[1]
    if not ok or not math.isfinite(value):
        problem = "bad fps" if key.endswith("fps") else f"bad {key}"
        raise BadSample(problem, f"{key} is {quoted(value)}; it must be a number from {limits[0]:g} to {limits[1]:g}")
    return float(value)


def whole(value: Any, key: str, limits: tuple[float, float]) -> int | None:
    """The same for a whole number; 3.0 is one."""
    read = number(value, key, limits)
    if read is not None and read != int(read):
        raise BadSample(f"bad {key}", f"{key} is {quoted(value)}; it must be a whole number")
    return None if read is None else int(read)


def truth(given: Mapping[str, Any], key: str) -> bool | None:
    """True, false, 1 or 0 of a key; None when it is absent or null.

    Raises:
        BadSample: it is something else.
    """
    value = given.get(key)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    raise BadSample(f"key {key}", f"{key} is {quoted(value)}; only true, false, 1 and 0 can be honoured")
