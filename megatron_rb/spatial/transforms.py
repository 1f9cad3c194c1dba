"""Changes to an image that move its points, masks, depth and camera along; one cannot exist without the others."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from megatron_rb.spatial.camera import Camera
from megatron_rb.spatial.points import ImageSize
from megatron_rb.spatial.values import Points, Unit


class ImageTransform(ABC):
    """What is done to a picture and to everything that refers to it; a subclass must say all five."""

    source: ImageSize
    """Size of the pictures it takes."""

    @property
    @abstractmethod
    def result(self) -> ImageSize:
        """Size of the pictures it gives."""

    @abstractmethod
    def image(self, image: Image.Image) -> Image.Image: ...

    @abstractmethod
    def labels(self, array: np.ndarray) -> np.ndarray:
        """A mask or depth picture [height, width]; values are moved, never mixed."""

    @abstractmethod
    def camera(self, camera: Camera) -> Camera: ...

    @abstractmethod
    def _move(self, pixels: np.ndarray) -> np.ndarray:
        """[n, 2] pixels of the source -> pixels of the result."""

    def points(self, points: Points) -> Points:
        """The points on the result, in the unit they came in; a point may come to lie outside (`Points.inside`)."""
        if points.size is not None and points.size != self.source:
            raise ValueError(f"points are pixels of a {points.size} image, the transform takes {self.source}")
        moved = self._move(points.in_pixels(self.source).values[:, :2])
        values = np.concatenate([moved, points.values[:, 2:]], axis=1)
        result = Points(values, Unit.PIXELS, self.result)
        return {Unit.PIXELS: lambda: result, Unit.GRID: result.on_grid, Unit.NORMALISED: result.normalised}[
            points.unit
        ]()

    def _check(self, size: ImageSize) -> None:
        if size != self.source:
            raise ValueError(f"the transform takes images of {self.source}, this one has {size}")


@dataclass(frozen=True)
class Resize(ImageTransform):
    source: ImageSize
    target: ImageSize

    @property
    def result(self) -> ImageSize:
        return self.target

    def image(self, image: Image.Image) -> Image.Image:
        self._check(ImageSize(*image.size))
        return image.resize((self.target.width, self.target.height), Image.Resampling.BICUBIC)

    def labels(self, array: np.ndarray) -> np.ndarray:
        self._check(ImageSize(array.shape[1], array.shape[0]))
        rows = ((np.arange(self.target.height) + 0.5) * self.source.height / self.target.height).astype(int)
        columns = ((np.arange(self.target.width) + 0.5) * self.source.width / self.target.width).astype(int)
        return array[rows[:, None], columns]

    def camera(self, camera: Camera) -> Camera:
        self._check(camera.size)
        return camera.resized(self.target)

    def _move(self, pixels: np.ndarray) -> np.ndarray:
        return pixels * (self.target.extent / self.source.extent)


@dataclass(frozen=True)
class Crop(ImageTransform):
    source: ImageSize
    left: int
    top: int
    window: ImageSize

    def __post_init__(self) -> None:
        right, bottom = self.left + self.window.width, self.top + self.window.height
        if self.left < 0 or self.top < 0 or right > self.source.width or bottom > self.source.height:
            raise ValueError(f"window {self.window} at ({self.left}, {self.top}) leaves the {self.source} image")

    @property
    def result(self) -> ImageSize:
        return self.window

    def image(self, image: Image.Image) -> Image.Image:
        self._check(ImageSize(*image.size))
        return image.crop((self.left, self.top, self.left + self.window.width, self.top + self.window.height))

    def labels(self, array: np.ndarray) -> np.ndarray:
        self._check(ImageSize(array.shape[1], array.shape[0]))
        return array[self.top : self.top + self.window.height, self.left : self.left + self.window.width]

    def camera(self, camera: Camera) -> Camera:
        self._check(camera.size)
        return camera.cropped(self.left, self.top, self.window)

    def _move(self, pixels: np.ndarray) -> np.ndarray:
        return pixels - (self.left, self.top)


@dataclass(frozen=True)
class HorizontalFlip(ImageTransform):
    """Left becomes right. Words like `left` in a question are the caller's to change."""

    source: ImageSize

    @property
    def result(self) -> ImageSize:
        return self.source

    def image(self, image: Image.Image) -> Image.Image:
        self._check(ImageSize(*image.size))
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)

    def labels(self, array: np.ndarray) -> np.ndarray:
        self._check(ImageSize(array.shape[1], array.shape[0]))
        return array[:, ::-1]

    def camera(self, camera: Camera) -> Camera:
        """Its first focal length is negative: a mirrored picture still leads back to the same points in space."""
        self._check(camera.size)
        intrinsics = camera.intrinsics.copy()
        intrinsics[0] = (-intrinsics[0, 0], -intrinsics[0, 1], self.source.width - intrinsics[0, 2])
        return replace(camera, intrinsics=intrinsics)

    def _move(self, pixels: np.ndarray) -> np.ndarray:
        return np.stack([self.source.width - pixels[:, 0], pixels[:, 1]], axis=1)
