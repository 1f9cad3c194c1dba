"""Distances between two traces: discrete Frechet, Hausdorff, RMSE.

Protocols: RoboBrain 2.0 / ShareRobot-T and VABench-V score 2-D traces normalised by width and height to [0, 1];
TraceSpatial resamples both traces before the RMSE. Values of different protocols do not compare.
"""

from __future__ import annotations

import numpy as np

from megatron_rb.spatial.traces import resample

EVEN_POINTS = 100
"""To which TraceSpatial resamples both traces."""


def discrete_frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Discrete Frechet distance of [n, dim] and [m, dim]: the shortest leash for two walkers who only step forward.

    Protocol: ShareRobot-T takes the points as they are, normalised to [0, 1]; an answer without any is the one point
    (0, 0). TraceSpatial takes metres and resamples both traces first.

    c(i, j) = max(|a_i - b_j|, min(c(i-1, j), c(i-1, j-1), c(i, j-1))), Eiter and Mannila 1994.
    """
    distances = _distances(a, b)
    row = np.maximum.accumulate(distances[0])
    for line in distances[1:].tolist():
        before = row.tolist()
        value = max(before[0], line[0])
        new = [value]
        for j in range(1, len(line)):
            value = max(min(before[j], before[j - 1], value), line[j])
            new.append(value)
        row = np.array(new)
    return float(row[-1])


def hausdorff(a: np.ndarray, b: np.ndarray) -> float:
    """The larger of both directed Hausdorff distances of [n, dim] and [m, dim]; protocol as for `discrete_frechet`."""
    distances = _distances(a, b)
    return float(max(distances.min(axis=1).max(), distances.min(axis=0).max()))


def rmse_shared(a: np.ndarray, b: np.ndarray) -> float:
    """sqrt(mean squared distance) over the first min(n, m) points, without resampling.

    Protocol: ShareRobot-T in FlagEvalMM, on coordinates normalised to [0, 1].
    """
    a, b = _checked(a), _checked(b)
    count = min(len(a), len(b))
    return float(np.sqrt(((a[:count] - b[:count]) ** 2).sum(axis=1).mean()))


def rmse_resampled(a: np.ndarray, b: np.ndarray, count: int = EVEN_POINTS) -> float:
    """sqrt(mean squared distance) after both traces are resampled to `count` points by arc length.

    Protocol: TraceSpatial, in metres for 3-D traces; one with a Frechet distance above 100 is left out of its means.
    """
    difference = resample(_checked(a), count) - resample(_checked(b), count)
    return float(np.sqrt((difference**2).sum(axis=1).mean()))


def _checked(points: np.ndarray) -> np.ndarray:
    points = np.asarray(points, dtype=np.float64)
    if points.ndim != 2 or len(points) == 0:
        raise ValueError(f"a trace has shape {points.shape}; give [points, dim] with at least one point")
    return points


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = _checked(a), _checked(b)
    return np.linalg.norm(a[:, None] - b[None], axis=-1)
