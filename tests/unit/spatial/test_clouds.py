import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rb.spatial.clouds import (
    CloudCleaning,
    clean_cloud,
    dbscan,
    mean_neighbour_distance,
    neighbour_pairs,
    remove_outliers,
    voxel_means,
)


def cloud(seed: int, count: int) -> np.ndarray:
    """Dense and thin parts side by side, so that one radius does not fit all."""
    rng = np.random.default_rng(seed)
    parts = [rng.normal(0, 0.02, (count, 3)), rng.normal(1, 0.3, (count // 3 + 1, 3)), rng.uniform(-9, 9, (2, 3))]
    return np.concatenate(parts)


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.linalg.norm(a[:, None] - b[None], axis=-1)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 60), st.integers(1, 12))
def test_neighbour_distance_equals_brute_force(seed, count, neighbours):
    points = cloud(seed, count)
    wanted = np.sort(distances(points, points), axis=1)[:, : min(neighbours, len(points))].mean(axis=1)
    np.testing.assert_allclose(mean_neighbour_distance(points, neighbours), wanted, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.floats(0.005, 3))
def test_pairs_equal_brute_force(seed, radius):
    points, queries = cloud(seed, 40), cloud(seed + 1, 7)
    query, point, distance = neighbour_pairs(queries, points, radius)
    every = distances(queries, points)
    assert set(zip(query.tolist(), point.tolist(), strict=True)) == set(zip(*np.nonzero(every <= radius), strict=True))
    np.testing.assert_allclose(distance, every[query, point])


def brute_dbscan(points: np.ndarray, radius: float, fewest: int) -> list[int]:
    """Point by point with a queue, as in the paper."""
    near = [np.flatnonzero(row <= radius).tolist() for row in distances(points, points)]
    labels, cluster = [None] * len(points), 0
    for start in range(len(points)):
        if labels[start] is not None or len(near[start]) < fewest:
            continue
        queue = [start]
        while queue:
            point = queue.pop(0)
            if labels[point] is not None:
                continue
            labels[point] = cluster
            if len(near[point]) >= fewest:
                queue += near[point]
        cluster += 1
    return [-1 if label is None else label for label in labels]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.floats(0.05, 0.6), st.integers(2, 6))
def test_clusters_equal_those_of_a_queue(seed, radius, fewest):
    points = np.random.default_rng(seed).uniform(0, 2, (60, 2))
    points = np.column_stack([points, np.zeros(60)])
    assert dbscan(points, radius, fewest).tolist() == brute_dbscan(points, radius, fewest)


def test_voxel_means_by_hand():
    # size 1, the grid begins at -0.5: the first two points share a voxel, the third (0.6) is in the next
    points = np.array([[0.0, 0, 0], [0.4, 0, 0], [0.6, 0, 0], [0, 3.0, 0]])
    assert sorted(voxel_means(points, 1.0).tolist()) == [[0.0, 3.0, 0.0], [0.2, 0.0, 0.0], [0.6, 0.0, 0.0]]


def test_outliers_by_hand():
    line = np.array([[0.0, 0, 0], [1, 0, 0], [2, 0, 0], [3, 0, 0], [100, 0, 0]])
    # nearest other: 1 1 1 1 97, with itself the mean of two is half of it: mean 10.1, deviation (n - 1) 21.5
    assert remove_outliers(line, 2, 1.2).tolist() == line[:4].tolist()
    assert len(remove_outliers(line, 2, 3.0)) == 5
    assert len(remove_outliers(line[:1], 2, 1.0)) == 0


def test_cleaning_keeps_the_object_and_nothing_else():
    side = np.linspace(0, 0.1, 40)
    plate = np.stack(np.meshgrid(side, side, [1.0]), axis=-1).reshape(-1, 3)
    crumb = plate[:30] * 0.1 + [0.5, 0, 1.0]  # a small second cluster
    stray = np.array([[2.0, 2, 2], [0.05, 0.05, 1.5]])
    kept = clean_cloud(np.concatenate([plate, crumb, stray]))
    assert len(kept) > 50
    assert (kept >= [-1e-9, -1e-9, 0.999]).all() and (kept <= [0.1 + 1e-9, 0.1 + 1e-9, 1.001]).all()
    # thinned, but nowhere with a hole: every point of the plate has one kept within a voxel's diagonal
    assert distances(plate, kept).min(axis=1).max() < 0.02


def test_empty_and_tiny_clouds():
    assert clean_cloud(np.zeros((0, 3))).shape == (0, 3)
    assert len(clean_cloud(np.array([[0, 0, 1.0]]))) <= 1
    few = np.array([[0, 0, 1.0], [0.001, 0, 1], [0, 0.001, 1], [0.001, 0.001, 1]])
    assert len(clean_cloud(few)) == pytest.approx(1, abs=3)


def test_the_steps_are_those_of_the_released_evaluation():
    """nb_neighbors 10, std_ratio 1.2, voxel max(.01, extent / 40), eps .02, min_points 10, at least 5 points."""
    assert CloudCleaning() == CloudCleaning(10, 1.2, 0.01, 40.0, 0.02, 10, 5)
