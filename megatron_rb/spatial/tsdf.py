"""Occupied space from a depth picture: a truncated signed distance field, its surface, the voxels the surface is in.

Definitions as in Open3D (`ScalableTSDFVolume`, `extract_point_cloud`, `VoxelGrid.create_from_point_cloud`), with which
TraceSpatial's evaluation works. Only voxels near measured points are looked at.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

VOXEL = 0.02
"""Metres."""
TRUNCATION = 4
"""Voxels."""
FARTHEST = 5.0
"""Metres; what is measured beyond is not used."""
SURE = 0.98
"""Share of the truncation up to which a distance counts as measured."""
BLOCK = 4
"""Voxels; a block is as long as the truncation, so the surface lies within the blocks around a measured point."""


@dataclass(frozen=True)
class OccupiedVoxels:
    """Voxels of a grid that hold a piece of surface."""

    origin: np.ndarray
    """`[3]` metres, the corner of voxel (0, 0, 0)."""
    size: float
    shape: np.ndarray
    """`[3]` voxels from the origin to the last one occupied."""
    numbers: np.ndarray
    """Sorted numbers of the occupied voxels."""

    def __len__(self) -> int:
        return len(self.numbers)

    def occupied(self, points: np.ndarray) -> np.ndarray:
        """Bool `[n]` for camera XYZ `[n, 3]`; as in the evaluation, coordinates are cut towards zero."""
        cells = ((np.asarray(points, dtype=np.float64) - self.origin) / self.size).astype(np.int64)
        within = ((cells >= 0) & (cells < self.shape)).all(axis=1)
        wanted = _numbers(cells, self.shape)
        place = np.minimum(np.searchsorted(self.numbers, wanted), max(len(self.numbers) - 1, 0))
        return within & (self.numbers[place] == wanted) if len(self.numbers) else np.zeros(len(cells), dtype=bool)


def occupied_voxels(depth: np.ndarray, intrinsics: np.ndarray) -> OccupiedVoxels:
    """Voxels that the surfaces of a depth picture pass through.

    Args:
        depth: `[height, width]` z-depth in metres, 0 = nothing measured.
        intrinsics: 3 x 3, pixels of this picture.
    """
    points = surface_points(depth, intrinsics)
    if not len(points):
        return OccupiedVoxels(np.zeros(3), VOXEL, np.zeros(3, dtype=np.int64), np.zeros(0, dtype=np.int64))
    origin = points.min(axis=0) - VOXEL / 2
    cells = np.floor((points - origin) / VOXEL).astype(np.int64)
    shape = cells.max(axis=0) + 1
    return OccupiedVoxels(origin, VOXEL, shape, np.unique(_numbers(cells, shape)))


def surface_points(depth: np.ndarray, intrinsics: np.ndarray) -> np.ndarray:
    """`[n, 3]` camera XYZ where the signed distance changes its sign between two neighbouring voxel centres."""
    depth = np.where(np.isfinite(depth) & (depth > 0) & (depth <= FARTHEST), depth, 0.0)
    cells = _voxels_near(depth, intrinsics)
    if not len(cells):
        return np.zeros((0, 3))
    centres = (cells + 0.5) * VOXEL
    distance = _signed_distance(centres, depth, intrinsics)
    measured = (distance < SURE) & (distance >= -SURE)
    cells, centres, distance = cells[measured], centres[measured], distance[measured]
    if not len(cells):
        return np.zeros((0, 3))
    shifted = cells - cells.min(axis=0)
    shape = shifted.max(axis=0) + 2
    numbers = _numbers(shifted, shape)
    order = np.argsort(numbers)
    found = []
    for axis, step in enumerate((shape[1] * shape[2], shape[2], 1)):
        place = np.minimum(np.searchsorted(numbers, numbers + step, sorter=order), len(order) - 1)
        other = order[place]
        crossing = (numbers[other] == numbers + step) & (distance * distance[other] < 0)
        near, far = np.abs(distance[crossing]), np.abs(distance[other[crossing]])
        points = centres[crossing].copy()
        points[:, axis] += VOXEL * near / (near + far)
        found.append(points)
    return np.concatenate(found)


def _voxels_near(depth: np.ndarray, intrinsics: np.ndarray) -> np.ndarray:
    """`[n, 3]` indices of all voxels in blocks with a measured point and in the blocks beside them."""
    rows, columns = np.nonzero(depth)
    z = depth[rows, columns]
    x = (columns - intrinsics[0, 2]) * z / intrinsics[0, 0]
    y = (rows - intrinsics[1, 2]) * z / intrinsics[1, 1]
    blocks = np.floor(np.stack([x, y, z], axis=-1) / (BLOCK * VOXEL)).astype(np.int64)
    beside = np.stack(np.meshgrid(*[(-1, 0, 1)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    inside = np.stack(np.meshgrid(*[range(BLOCK)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    around = _unique(_unique(blocks)[:, None] + beside)
    return (around[:, None] * BLOCK + inside).reshape(-1, 3)


def _signed_distance(centres: np.ndarray, depth: np.ndarray, intrinsics: np.ndarray) -> np.ndarray:
    """`[n]` distance along the ray to the surface in truncations, at most 1; -inf where nothing is known."""
    height, width = depth.shape
    fx, fy, cx, cy = intrinsics[0, 0], intrinsics[1, 1], intrinsics[0, 2], intrinsics[1, 2]
    z = centres[:, 2]
    safe = np.where(z > 0, z, 1.0)
    u, v = centres[:, 0] * fx / safe + cx + 0.5, centres[:, 1] * fy / safe + cy + 0.5
    seen = (z > 0) & (u >= 1e-4) & (u < width - 1e-4) & (v >= 1e-4) & (v < height - 1e-4)
    columns, rows = np.where(seen, u, 0).astype(np.int64), np.where(seen, v, 0).astype(np.int64)
    measured = depth[rows, columns]
    ray = np.sqrt(1.0 + ((columns - cx) / fx) ** 2 + ((rows - cy) / fy) ** 2)
    distance = np.minimum((measured - z) * ray / (TRUNCATION * VOXEL), 1.0)
    return np.where(seen & (measured > 0) & (distance > -1.0), distance, -np.inf)


def _unique(cells: np.ndarray) -> np.ndarray:
    cells = cells.reshape(-1, 3)
    if not len(cells):
        return cells
    least = cells.min(axis=0)
    shape = cells.max(axis=0) - least + 1
    numbers = np.unique(_numbers(cells - least, shape))
    return np.stack([numbers // (shape[1] * shape[2]), numbers // shape[2] % shape[1], numbers % shape[2]], -1) + least


def _numbers(cells: np.ndarray, shape: np.ndarray) -> np.ndarray:
    return (cells[:, 0] * shape[1] + cells[:, 1]) * shape[2] + cells[:, 2]
