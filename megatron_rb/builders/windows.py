"""Square windows cut out of a view: the same scene at many places in the picture, with a camera that still fits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_rb.builders.episodes import View
from megatron_rb.spatial.points import ImageSize
from megatron_rb.spatial.transforms import Crop

MARGIN = 0.05
"""Share of the window's side that stays free between the point and the edge."""


@dataclass(frozen=True)
class Window:
    left: int
    top: int
    side: int


def window_around(pixel: np.ndarray, size: ImageSize, side: int, rng: np.random.Generator) -> Window | None:
    """A window at a random place that holds the pixel; None when the pixel is too near the edge of the image."""
    if side > min(size.width, size.height):
        raise ValueError(f"a window of {side} pixels does not fit into the {size.width} x {size.height} image")
    free = side * MARGIN
    low = np.maximum(0, np.ceil(pixel - side + free)).astype(int)
    high = np.minimum(size.extent - side, np.floor(pixel - free)).astype(int)
    if (high < low).any():
        return None
    left, top = (int(rng.integers(a, b, endpoint=True)) for a, b in zip(low, high, strict=True))
    return Window(left, top, side)


def cut(view: View, name: str, window: Window, stem: Path) -> View:
    """Write the window's picture and the mask of one object beside each other and return the view they make."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    image, mask = stem.with_suffix(".jpg"), stem.with_suffix(".png")
    crop = Crop(view.camera.size, window.left, window.top, ImageSize(window.side, window.side))
    with Image.open(view.image) as source:
        crop.image(source).save(image, quality=90)
    Image.fromarray(crop.labels(view.mask(name))).save(mask)
    return View(image=image, camera=crop.camera(view.camera), masks={name: mask}, depth=None)
