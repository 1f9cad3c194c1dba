"""Few key points for a long trace (Ramer-Douglas-Peucker), and even points along a trace."""

from __future__ import annotations

import numpy as np

MOST_KEY_POINTS = 8
"""RoboTracer and RoboBrain 2.5: at most 8 key points in a trace."""


def simplify(points: np.ndarray, tolerance: float) -> np.ndarray:
    """Numbers of the points that Ramer-Douglas-Peucker keeps: no point lies further than `tolerance` from the segment
    of kept points around it.

    Args:
        points: [n, dim].
        tolerance: in the unit of the points.
    """
    points = np.asarray(points, dtype=np.float64)
    keep = {0, len(points) - 1}
    waiting = [(0, len(points) - 1)]
    while waiting:
        first, last = waiting.pop()
        place, distance = _farthest(points, first, last)
        if distance > tolerance:
            keep.add(place)
            waiting += [(first, place), (place, last)]
    return np.array(sorted(keep))


def key_points(points: np.ndarray, most: int = MOST_KEY_POINTS) -> np.ndarray:
    """Numbers of at most `most` points: those of the smallest Ramer-Douglas-Peucker tolerance that keeps so few.

    Both ends are kept. A trace that has no more than `most` points keeps all that lie off the straight line.

    Raises:
        ValueError: fewer than two points, or `most` below 2.
    """
    points = np.asarray(points, dtype=np.float64)
    if len(points) < 2 or most < 2:
        raise ValueError(f"a trace of {len(points)} points cut to {most}; both must be at least 2")
    kept = simplify(points, 1e-9 * float(np.ptp(points)))  # rounding does not count as a bend
    if len(kept) <= most:
        return kept
    tolerances = np.unique(_split_distances(points))
    low, high = 0, len(tolerances) - 1
    while low < high:
        middle = (low + high) // 2
        if len(simplify(points, tolerances[middle])) <= most:
            high = middle
        else:
            low = middle + 1
    return simplify(points, tolerances[low])


def resample(points: np.ndarray, count: int) -> np.ndarray:
    """[count, dim] points at even distances along the polyline [n, dim]; one point or no length repeats the first."""
    points = np.asarray(points, dtype=np.float64)
    steps = np.linalg.norm(np.diff(points, axis=0), axis=1)
    along = np.append(0.0, np.cumsum(steps))
    if along[-1] == 0:
        return np.repeat(points[:1], count, axis=0)
    wanted = np.linspace(0.0, along[-1], count)
    return np.stack([np.interp(wanted, along, column) for column in points.T], axis=1)


def _farthest(points: np.ndarray, first: int, last: int) -> tuple[int, float]:
    """Number and distance of the point between both that is farthest from the segment; -1 when there is none."""
    if last - first < 2:
        return first, -1.0
    start, span = points[first], points[last] - points[first]
    offsets = points[first + 1 : last] - start
    length = float(span @ span)
    along = np.clip(offsets @ span / length, 0.0, 1.0) if length > 0 else np.zeros(len(offsets))
    distances = np.linalg.norm(offsets - along[:, None] * span, axis=1)
    place = int(distances.argmax())
    return first + 1 + place, float(distances[place])


def _split_distances(points: np.ndarray) -> np.ndarray:
    """Distance of every split of the full Ramer-Douglas-Peucker tree: the tolerances at which something changes."""
    distances, waiting = [], [(0, len(points) - 1)]
    while waiting:
        first, last = waiting.pop()
        place, distance = _farthest(points, first, last)
        if distance >= 0:
            distances.append(distance)
            waiting += [(first, place), (place, last)]
    return np.array(distances)
