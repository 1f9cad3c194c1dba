"""Check of the points that a row carries beside its conversation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_rb.data.problems import BadSample

GRID = "0-1000"
PIXELS = "pixels"
LARGEST = 1e9
"""More pixels than a side can have."""


def check_points(row: Mapping[str, Any]) -> None:
    """Refuse a row with a point outside its image.

    `points` is either `{"points": [[u, v], ...], "frame": "0-1000" | "pixels", "size": [width, height]}`, or names with
    points in 0-1000: `{"red cube": [[u, v], ...]}`; a third number (depth) is not looked at.

    Raises:
        BadSample: a point lies outside, or `points` cannot be read.
    """
    given = row.get("points")
    if given is None:
        return
    if not isinstance(given, Mapping):
        raise BadSample("bad points", f"points is a {type(given).__name__}; give an object")
    width, height = _extent(given) if "points" in given else (1000.0, 1000.0)
    closed = given.get("frame", GRID) == GRID
    for u, v in _coordinates(given["points"] if "points" in given else list(_all(given))):
        if not (_within(u, width, closed) and _within(v, height, closed)):
            raise BadSample("point outside", f"the point ({u:g}, {v:g}) lies outside {width:g} x {height:g}")


def pixel_size(row: Mapping[str, Any]) -> tuple[int, int] | None:
    """(width, height) of the picture whose pixels the points of a checked row are; None for 0-1000, or no points."""
    given = row.get("points")
    if not isinstance(given, Mapping) or "points" not in given or given.get("frame", GRID) != PIXELS:
        return None
    return int(given["size"][0]), int(given["size"][1])


def _extent(given: Mapping[str, Any]) -> tuple[float, float]:
    frame = given.get("frame", GRID)
    if frame == GRID:
        return 1000.0, 1000.0
    if frame != PIXELS:
        raise BadSample("bad points", f"points have frame {frame!r}; use {GRID!r} or {PIXELS!r}")
    size = given.get("size")
    if not isinstance(size, list) or len(size) != 2 or not all(_number(side) and 0 < side < LARGEST for side in size):
        raise BadSample("bad points", f"points in pixels have size {size!r}; give [width, height]")
    return float(size[0]), float(size[1])


def _all(given: Mapping[str, Any]) -> Iterator[Any]:
    for name, points in given.items():
        if not isinstance(points, list):
            raise BadSample("bad points", f"points of {name!r} are not a list")
        yield from points


def _coordinates(points: Any) -> Iterator[tuple[float, float]]:
    if not isinstance(points, list):
        raise BadSample("bad points", f"points {points!r} are not a list")
    for point in points:
        if not isinstance(point, list) or len(point) < 2 or not all(map(_number, point)):
            raise BadSample("bad points", f"the point {point!r} is not a list of two or three numbers")
        yield float(point[0]), float(point[1])


def _number(value: Any) -> bool:
    """Whether it is a number; integers of hundreds of digits, which JSON can hold, are none."""
    return isinstance(value, float) or (type(value) is int and abs(value) < LARGEST)


def _within(value: float, extent: float, closed: bool) -> bool:
    """0-1000 includes both ends; pixel i covers [i, i + 1), so the far edge is outside. NaN is never within."""
    return 0 <= value <= extent if closed else 0 <= value < extent
