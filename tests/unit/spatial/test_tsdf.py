import numpy as np
import pytest

from megatron_rb.spatial.tsdf import FARTHEST, TRUNCATION, VOXEL, occupied_voxels, surface_points

INTRINSICS = np.array([[120.0, 0, 50], [0, 120.0, 40], [0, 0, 1]])


def wall(metres: float) -> np.ndarray:
    return np.full((80, 100), metres)


def test_the_volume_is_that_of_the_released_evaluation():
    """voxel 0.02 m, sdf_trunc 4 voxels, depth_trunc 5 m; all else here is computed from these."""
    assert (VOXEL, TRUNCATION, FARTHEST) == (0.02, 4, 5.0)


def test_a_wall_is_where_it_is():
    points = surface_points(wall(1.0), INTRINSICS)
    # a plane across the axis: the field is linear along z but for the pixel that a voxel falls on
    assert len(points) > 1000 and np.abs(points[:, 2] - 1.0).max() < 1e-4
    reach = (50 / 120, 40 / 120)
    assert np.abs(points[:, 0]).max() == pytest.approx(reach[0], abs=2 * VOXEL)
    assert np.abs(points[:, 1]).max() == pytest.approx(reach[1], abs=2 * VOXEL)


def test_only_the_surface_is_occupied():
    space = occupied_voxels(wall(1.0), INTRINSICS)
    depths = np.array([0.5, 0.97, 1.0, 1.03, 1.5])
    points = np.column_stack([np.full(5, 0.101), np.full(5, 0.001), depths])
    assert space.occupied(points).tolist() == [False, False, True, False, False]
    assert not space.occupied(np.array([[3.0, 0, 1.0], [0, 0, -1.0]])).any()


def brute_surface(depth: np.ndarray, intrinsics: np.ndarray, low: np.ndarray, high: np.ndarray) -> set:
    """Every voxel of a box one by one, as Open3D's volume is filled and searched."""
    fx, fy, cx, cy = intrinsics[0, 0], intrinsics[1, 1], intrinsics[0, 2], intrinsics[1, 2]
    field = {}
    for index in np.ndindex(*(high - low)):
        cell = tuple((low + index).tolist())
        x, y, z = ((np.array(cell) + 0.5) * VOXEL).tolist()
        if z <= 0:
            continue
        u, v = x * fx / z + cx + 0.5, y * fy / z + cy + 0.5
        if not (1e-4 <= u < depth.shape[1] - 1e-4 and 1e-4 <= v < depth.shape[0] - 1e-4):
            continue
        d = depth[int(v), int(u)]
        if d <= 0:
            continue
        sdf = (d - z) * np.sqrt(1 + ((int(u) - cx) / fx) ** 2 + ((int(v) - cy) / fy) ** 2)
        if sdf > -TRUNCATION * VOXEL:
            field[cell] = min(1.0, sdf / (TRUNCATION * VOXEL))
    found = set()
    for cell, value in field.items():
        for axis in range(3):
            other = list(cell)
            other[axis] += 1
            beside = field.get(tuple(other))
            if beside is None or not all(-0.98 <= f < 0.98 for f in (value, beside)) or value * beside >= 0:
                continue
            point = (np.array(cell) + 0.5) * VOXEL
            point[axis] += VOXEL * abs(value) / (abs(value) + abs(beside))
            found.add(tuple(point.round(9).tolist()))
    return found


def test_surface_equals_a_search_through_every_voxel():
    rng = np.random.default_rng(0)
    small = np.array([[20.0, 0, 8.2], [0, 22.0, 6.7], [0, 0, 1]])
    rows, columns = np.mgrid[:14, :17]
    depth = 0.5 + 0.01 * columns + 0.02 * rows
    depth[4:9, 5:11] = 0.4  # something nearer, with a step all around
    depth[10:, :3] = 0.0  # nothing measured
    depth += rng.uniform(0, 0.004, depth.shape)
    low, high = np.array([-20, -20, 10]), np.array([30, 30, 52])
    got = {tuple(point.round(9).tolist()) for point in surface_points(depth, small)}
    assert len(got) > 500 and got == brute_surface(depth, small, low, high)


def test_what_is_missing_or_far_occupies_nothing():
    depth = wall(1.0)
    depth[:, :50], depth[:40] = np.nan, 0.0
    points = surface_points(depth, INTRINSICS)
    assert len(points) and points[:, 0].min() > -VOXEL and points[:, 1].min() > -VOXEL
    assert len(occupied_voxels(wall(5.5), INTRINSICS)) == 0
    assert not occupied_voxels(wall(0.0), INTRINSICS).occupied(np.ones((3, 3))).any()
