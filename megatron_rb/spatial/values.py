"""Points, traces and boxes that carry their unit, so that absolute pixels and 0-1000 cannot be mixed.

RoboBrain 2.0 reads and writes pixels of the resized picture, RoboBrain 2.5 integers 0-1000 (arXiv 2507.02029,
2601.14352). Depth is z-depth in metres, not the length of the ray.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np

from megatron_rb.spatial.camera import Camera
from megatron_rb.spatial.points import GRID, ImageSize, inside


class Unit(str, Enum):
    GRID = "0-1000"
    PIXELS = "pixels"
    NORMALISED = "normalised"

    __str__ = str.__str__


@dataclass(frozen=True)
class Points:
    """One or more points of an image; a trace is points in the order of time."""

    values: np.ndarray
    """[n, 2] (u, v) or [n, 3] (u, v, z-depth in metres)."""
    unit: Unit
    size: ImageSize | None = None
    """The image whose pixels are meant; needed for pixels, not allowed otherwise."""

    def __post_init__(self) -> None:
        values = np.asarray(self.values, dtype=np.float64)
        if values.ndim != 2 or values.shape[1] not in (2, 3):
            raise ValueError(f"points have shape {values.shape}; give [n, 2] or [n, 3]")
        if (self.size is None) == (self.unit is Unit.PIXELS):
            raise ValueError(
                f"points in {self.unit} with size {self.size}; pixels need the size of their image, others have none"
            )
        if not np.isfinite(values).all():
            raise ValueError(f"points {values.tolist()} hold values that are not finite")
        if values.shape[1] == 3 and (values[:, 2] <= 0).any():
            raise ValueError(f"z-depths {values[:, 2].tolist()} m must be positive")
        object.__setattr__(self, "values", values)

    def __len__(self) -> int:
        return len(self.values)

    @property
    def has_depth(self) -> bool:
        return self.values.shape[1] == 3

    @property
    def extent(self) -> np.ndarray:
        """Full width and height in this unit."""
        if self.size is not None:
            return self.size.extent
        return np.full(2, float(GRID) if self.unit is Unit.GRID else 1.0)

    def normalised(self) -> Points:
        """The same points as fractions of the image."""
        return Points(self._scaled(np.ones(2)), Unit.NORMALISED)

    def on_grid(self) -> Points:
        """The same points in 0-1000, not rounded."""
        return Points(self._scaled(np.full(2, float(GRID))), Unit.GRID)

    def in_pixels(self, size: ImageSize) -> Points:
        """The same points in pixels of the same picture at this size."""
        return Points(self._scaled(size.extent), Unit.PIXELS, size)

    def without_depth(self) -> Points:
        return Points(self.values[:, :2], self.unit, self.size)

    def inside(self) -> np.ndarray:
        """Bool [n]: on the image."""
        return inside(self.normalised().values[:, :2], ImageSize(1, 1))

    def in_camera(self, camera: Camera) -> np.ndarray:
        """[n, 3] XYZ metres in the camera's frame.

        Raises:
            ValueError: no depth, or pixels of another resolution than the intrinsics hold for.
        """
        if not self.has_depth:
            raise ValueError(f"{len(self)} points without depth have no place in space; give (u, v, d)")
        if self.size is not None and self.size != camera.size:
            raise ValueError(
                f"points are pixels of a {self.size} image, the intrinsics hold for {camera.size}; use "
                f"camera.resized(...) or points.in_pixels(...)"
            )
        return camera.back_project(self.in_pixels(camera.size).values)

    def in_world(self, camera: Camera) -> np.ndarray:
        """[n, 3] XYZ metres in the world's frame; raises as `in_camera`."""
        return camera.camera_to_world_points(self.in_camera(camera))

    @classmethod
    def of_world(cls, xyz: np.ndarray, camera: Camera) -> Points:
        """(u, v, d) in pixels of the camera's image from [n, 3] world XYZ.

        Raises:
            ValueError: a point lies behind the camera.
        """
        return cls(camera.project(np.atleast_2d(xyz)), Unit.PIXELS, camera.size)

    @classmethod
    def of_camera(cls, xyz: np.ndarray, camera: Camera) -> Points:
        """(u, v, d) in pixels of the camera's image from [n, 3] XYZ in its frame; raises as `of_world`."""
        return cls(camera.project_seen(np.atleast_2d(xyz)), Unit.PIXELS, camera.size)

    def require(self, unit: Unit) -> Points:
        """These points, or an error that names both units."""
        if self.unit is not unit:
            raise ValueError(f"points are in {self.unit}, {unit} is expected; convert them, the numbers do not compare")
        return self

    def _scaled(self, extent: np.ndarray) -> np.ndarray:
        uv = self.values[:, :2] * (extent / self.extent)
        return np.concatenate([uv, self.values[:, 2:]], axis=1)


@dataclass(frozen=True)
class Box:
    """An axis-parallel rectangle."""

    corners: Points
    """[2, 2]: upper left, lower right."""

    def __post_init__(self) -> None:
        if self.corners.values.shape != (2, 2) or (self.corners.values[1] < self.corners.values[0]).any():
            raise ValueError(f"box {self.corners.values.tolist()} must be upper left and lower right corner")

    @classmethod
    def of_mask(cls, mask: np.ndarray) -> Box:
        """The smallest box around the pixels of a bool mask [height, width].

        Raises:
            ValueError: the mask is empty.
        """
        rows, columns = np.nonzero(mask)
        if len(rows) == 0:
            raise ValueError(f"the {mask.shape[1]} x {mask.shape[0]} mask is empty and has no box")
        corners = [[columns.min(), rows.min()], [columns.max() + 1, rows.max() + 1]]
        return cls(Points(np.array(corners), Unit.PIXELS, ImageSize(mask.shape[1], mask.shape[0])))
