"""Image points in three units: pixels, integers 0-1000 (what the model reads and writes) and fractions of the image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

GRID = 1000


@dataclass(frozen=True)
class ImageSize:
    width: int
    height: int

    def __post_init__(self) -> None:
        if self.width < 1 or self.height < 1:
            raise ValueError(f"image size {self.width} x {self.height} is empty; give width and height of at least 1")

    def __str__(self) -> str:
        return f"{self.width} x {self.height}"

    @property
    def extent(self) -> np.ndarray:
        return np.array([self.width, self.height], dtype=np.float64)


def inside(pixels: np.ndarray, size: ImageSize) -> np.ndarray:
    """Bool per point [..., 2]: on the image, whose pixel (i, j) covers [i, i+1) x [j, j+1)."""
    pixels = np.asarray(pixels, dtype=np.float64)
    return np.asarray(((pixels >= 0) & (pixels < size.extent)).all(axis=-1))


def pixels_to_fractions(pixels: np.ndarray, size: ImageSize) -> np.ndarray:
    """[..., 2] pixels -> [..., 2] in [0, 1]; a point beyond the image's edge is an error."""
    fractions = np.asarray(pixels, dtype=np.float64) / size.extent
    _require(fractions, 1.0, "image fractions")
    return fractions


def pixels_to_grid(pixels: np.ndarray, size: ImageSize) -> np.ndarray:
    """[..., 2] pixels -> nearest integers 0-1000."""
    return np.rint(pixels_to_fractions(pixels, size) * GRID).astype(np.int64)


def grid_to_pixels(grid: np.ndarray, size: ImageSize) -> np.ndarray:
    """[..., 2] values 0-1000 -> pixels, with fractions of a pixel."""
    grid = np.asarray(grid, dtype=np.float64)
    _require(grid, GRID, "0-1000 coordinates")
    return grid / GRID * size.extent


def pixel_index(pixels: np.ndarray, size: ImageSize) -> tuple[np.ndarray, np.ndarray]:
    """(row, column) of the pixel under each point; the far edge itself belongs to the last row and column."""
    cells = np.clip(np.floor(np.asarray(pixels, dtype=np.float64)), 0, size.extent - 1).astype(np.int64)
    return cells[..., 1], cells[..., 0]


def _require(values: np.ndarray, largest: float, unit: str) -> None:
    if not np.isfinite(values).all() or (values < 0).any() or (values > largest).any():
        raise ValueError(f"{unit} {values.tolist()} lie outside [0, {largest:g}]; check the image size")
