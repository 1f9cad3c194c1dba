"""Point clouds without outliers: statistical removal, voxel downsampling, the largest DBSCAN cluster.

Definitions as in Open3D, so that scores do not depend on whether it is installed. Everything runs on cells of a grid,
sorted by number, instead of a tree.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Pairs = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Number of the query, number of the point, distance."""


@dataclass(frozen=True)
class CloudCleaning:
    """The steps that TraceSpatial's evaluation applies to an object's points."""

    neighbours: int = 10
    deviations: float = 1.2
    smallest_voxel: float = 0.01
    """Metres."""
    voxels_per_extent: float = 40.0
    """A voxel is at least this part of three standard deviations of the cloud."""
    cluster_radius: float = 0.02
    cluster_points: int = 10
    fewest: int = 5
    """A largest cluster of fewer points is not trusted: the cloud then stays as it is."""


def clean_cloud(points: np.ndarray, rules: CloudCleaning | None = None) -> np.ndarray:
    """`[n, 3]` metres -> `[m, 3]`: outliers out, then voxels, then the largest cluster. An empty cloud stays empty."""
    rules = rules or CloudCleaning()
    points = np.asarray(points, dtype=np.float64).reshape(-1, 3)
    if not len(points):
        return points
    extent = 3.0 * float(np.linalg.norm(points.std(axis=0))) + 1e-6
    kept = remove_outliers(points, rules.neighbours, rules.deviations)
    thinned = voxel_means(kept, max(rules.smallest_voxel, extent / rules.voxels_per_extent))
    labels = dbscan(thinned, rules.cluster_radius, rules.cluster_points)
    counts = np.bincount(labels[labels >= 0]) if (labels >= 0).any() else np.zeros(1, dtype=np.int64)
    largest = thinned[labels == counts.argmax()]
    return largest if len(largest) >= rules.fewest else thinned


def remove_outliers(points: np.ndarray, neighbours: int, deviations: float) -> np.ndarray:
    """Points whose mean distance to their nearest neighbours is below the mean of all plus some deviations.

    Args:
        neighbours: of each point, itself among them.
    """
    if len(points) < 2:
        return points[:0]
    distances = mean_neighbour_distance(points, neighbours)
    # As Open3D counts: points that coincide with all their neighbours are left out of the sums and of the result.
    apart = distances > 0
    mean = distances[apart].sum() / len(points)
    spread = np.sqrt(((distances[apart] - mean) ** 2).sum() / (len(points) - 1))
    return points[apart & (distances < mean + deviations * spread)]


def mean_neighbour_distance(points: np.ndarray, count: int) -> np.ndarray:
    """`[n]` mean distance of each point to its `count` nearest ones, itself among them; all when there are fewer."""
    count = min(count, len(points))
    result = np.zeros(len(points))
    waiting, radius = np.arange(len(points)), _usual_reach(points, count)
    while len(waiting):
        query, _, distance = neighbour_pairs(points[waiting], points, radius)
        order = np.argsort(query + distance / (2 * radius))  # by query, then by distance
        query, distance = query[order], distance[order]
        found = np.bincount(query, minlength=len(waiting))
        starts = np.cumsum(found) - found
        done = found >= count
        nearest = starts[done][:, None] + np.arange(count)
        result[waiting[done]] = distance[nearest].mean(axis=1)
        waiting, radius = waiting[~done], radius * 2
    return result


def _usual_reach(points: np.ndarray, count: int) -> float:
    """A radius within which most points have `count` neighbours, from a sample of them."""
    sample = points[:: max(1, len(points) // 64)]
    distances = np.linalg.norm(sample[:, None] - points[None], axis=-1)
    reach = float(np.quantile(np.partition(distances, count - 1, axis=1)[:, count - 1], 0.9))
    return max(reach, 1e-6)


def voxel_means(points: np.ndarray, size: float) -> np.ndarray:
    """`[m, 3]`: the mean of the points in every occupied voxel; the grid begins half a voxel below the least point."""
    if not len(points):
        return points
    index = np.floor((points - (points.min(axis=0) - size / 2)) / size).astype(np.int64)
    _, where, counts = np.unique(_numbers(index, index.max(axis=0) + 1), return_inverse=True, return_counts=True)
    sums = np.stack([np.bincount(where, weights=points[:, axis]) for axis in range(3)], axis=-1)
    return sums / counts[:, None]


def dbscan(points: np.ndarray, radius: float, fewest: int) -> np.ndarray:
    """Cluster number of every point, -1 = noise, clusters numbered by their first core point (Ester et al. 1996).

    Args:
        fewest: points within the radius, itself among them, that make a point a core point.
    """
    if not len(points):
        return np.zeros(0, dtype=np.int64)
    query, other, _ = neighbour_pairs(points, points, radius)
    core = np.bincount(query, minlength=len(points)) >= fewest
    joined = core[query] & core[other]
    least = _components(query[joined], other[joined], len(points))
    # A point near a core point that is none itself joins the first cluster that reaches it.
    labels = np.where(core, least, len(points))
    border = ~core[query] & core[other]
    np.minimum.at(labels, query[border], least[other[border]])
    _, numbers = np.unique(labels, return_inverse=True)
    return np.where(labels < len(points), numbers, -1)


def _components(first: np.ndarray, second: np.ndarray, count: int) -> np.ndarray:
    """Least member of the connected component of every point; edges are given in both directions."""
    labels = np.arange(count)
    while True:
        lower = labels.copy()
        np.minimum.at(lower, first, labels[second])
        lower = lower[lower]
        if (lower == labels).all():
            return labels
        labels = lower


def neighbour_pairs(queries: np.ndarray, points: np.ndarray, radius: float) -> Pairs:
    """All pairs of a query and a point that are at most `radius` apart."""
    origin = points.min(axis=0)
    cells, asked = (np.floor((x - origin) / radius).astype(np.int64) + 1 for x in (points, queries))
    sizes = np.maximum(cells.max(axis=0), asked.max(axis=0)) + 2
    numbers = _numbers(cells, sizes)
    order = np.argsort(numbers, kind="stable")
    numbers = numbers[order]
    found: list[Pairs] = []
    for dx in (-1, 0, 1):
        for dy in (-1, 0, 1):
            # Three cells in a row along the last axis have neighbouring numbers.
            middle = _numbers(asked + np.array([dx, dy, 0]), sizes)
            start = np.searchsorted(numbers, middle - 1, side="left")
            counts = np.searchsorted(numbers, middle + 1, side="right") - start
            query = np.repeat(np.arange(len(queries)), counts)
            place = np.arange(len(query)) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(start, counts)
            point = order[place]
            distance = np.linalg.norm(queries[query] - points[point], axis=1)
            near = distance <= radius
            found.append((query[near], point[near], distance[near]))
    first, second, distance = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return first, second, distance


def _numbers(cells: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    return (cells[:, 0] * sizes[1] + cells[:, 1]) * sizes[2] + cells[:, 2]
