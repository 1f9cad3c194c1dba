"""Images and videos -> patches, by the processor files of a Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from megatron_rb.data.media_options import NO_OPTIONS, MediaOptions
from megatron_rb.data.resize import SizeRule, image_target, video_target
from megatron_rb.data.sample import VisionGrid
from megatron_rb.shapes.families import CLIP_MEAN, CLIP_STD, Family
from megatron_rb.shapes.fields import check_type, mapping
from megatron_rb.shapes.shape import RoboBrainShape

IMAGE_PIXELS = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}
"""What the image processor class of transformers assumes for a size that its file leaves out; all families have it."""
BICUBIC = 3


@dataclass(frozen=True)
class Colours:
    """How bytes become numbers: `(byte * scale - mean) / std` per channel."""

    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def planes(self, frames: Sequence[np.ndarray]) -> np.ndarray:
        """Frames of bytes `[height, width, 3]` -> float32 `[3, frames, height, width]`."""
        values = np.empty((3, len(frames), *frames[0].shape[:2]), dtype=np.float32)
        for plane, numbers, channel in zip(values, self._table(), range(3), strict=True):
            for number, frame in enumerate(frames):
                np.take(numbers, frame[..., channel], out=plane[number], mode="clip")
        return values

    def _table(self) -> np.ndarray:
        """float32 `[3, 256]`: the number of every byte in every channel, with the roundings of transformers."""
        scaled = (np.arange(256, dtype=np.float64) * self.scale).astype(np.float32)
        mean, std = np.array([self.mean, self.std], dtype=np.float32)[:, :, None]
        return (scaled - mean) / std


@dataclass(frozen=True)
class VideoLimits:
    """How many frames of a file the processor samples."""

    min_frames: int
    max_frames: int


@dataclass(frozen=True)
class VisionProcessor:
    """Sizes and values of patches, as the processors of transformers make them."""

    family: Family
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    image_size: SizeRule
    video_size: SizeRule
    image_colours: Colours
    video_colours: Colours
    video_limits: VideoLimits

    def description(self) -> dict[str, Any]:
        """All that patches depend on, JSON-able."""
        rules = {name: value for name, value in vars(self).items() if name != "family"}
        plain = {name: dict(vars(value)) if is_dataclass(value) else value for name, value in rules.items()}
        return plain | {"family": self.family.name}

    @property
    def patch_dim(self) -> int:
        return 3 * self.temporal_patch_size * self.patch_size**2

    def num_tokens(self, grid: VisionGrid) -> int:
        """Placeholders that a grid takes in the sequence."""
        return grid.patches // self.merge_size**2

    def image_grid(self, height: int, width: int, options: MediaOptions = NO_OPTIONS) -> VisionGrid:
        """Patches of an image of this size in pixels."""
        high, wide = image_target(height, width, self.image_size, options)
        return VisionGrid(1, high // self.patch_size, wide // self.patch_size, "image")

    def video_grid(
        self, frames: int, height: int, width: int, second_per_grid: float = 0.0, options: MediaOptions = NO_OPTIONS
    ) -> VisionGrid:
        """Patches of so many frames of this size; an odd last frame is repeated to fill its temporal patch."""
        high, wide = self._video_target(frames, height, width, options)
        depth = -(-frames // self.temporal_patch_size)
        return VisionGrid(depth, high // self.patch_size, wide // self.patch_size, "video", second_per_grid)

    def image_patches(self, image: Image.Image, options: MediaOptions = NO_OPTIONS) -> np.ndarray:
        """float32 `[h * w, patch_dim]`: the image stands in every frame of its temporal patch."""
        size = image_target(image.height, image.width, self.image_size, options)
        return self._patches(self.image_colours.planes([_resize(image, size)]), repeat=self.temporal_patch_size)

    def video_patches(self, frames: Sequence[Image.Image], options: MediaOptions = NO_OPTIONS) -> np.ndarray:
        """float32 `[t * h * w, patch_dim]` of frames that share one size."""
        size = self._video_target(len(frames), frames[0].height, frames[0].width, options)
        pixels = [_resize(frame, size) for frame in frames]
        pixels += [pixels[-1]] * (-len(frames) % self.temporal_patch_size)
        return self._patches(self.video_colours.planes(pixels), repeat=1)

    def _video_target(self, frames: int, height: int, width: int, options: MediaOptions) -> tuple[int, int]:
        return video_target(height, width, self.video_size, frames, self.temporal_patch_size, options)

    def _patches(self, planes: np.ndarray, repeat: int) -> np.ndarray:
        """float32 `[3, frames, height, width]` -> patches in merge-block order, each channel, frame, row, column.

        Args:
            repeat: times that each frame stands in its temporal patch.
        """
        _, frames, height, width = planes.shape
        merge, side, depth = self.merge_size, self.patch_size, self.temporal_patch_size // repeat
        rows, columns = height // (side * merge), width // (side * merge)
        blocks = planes.reshape(3, frames // depth, depth, rows, merge, side, columns, merge, side)
        # (time, row, column) of the block, (row, column) in the block, channel, then inside the patch.
        blocks = blocks.transpose(1, 3, 6, 4, 7, 0, 2, 5, 8)
        shape = (*blocks.shape[:6], self.temporal_patch_size, side, side)
        return np.broadcast_to(blocks, shape).reshape(-1, self.patch_dim)


def build_processor(
    folder: str | Path, shape: RoboBrainShape, min_pixels: int = 0, max_pixels: int = 0
) -> VisionProcessor:
    """Read the processor files of a Hugging Face folder: `processor_config.json` (transformers 5), or
    `preprocessor_config.json` and `video_preprocessor_config.json`.

    Args:
        min_pixels, max_pixels: limits of an image that replace those of the file; 0 = keep them.

    Raises:
        ValueError: no file, a file that contradicts the model, or settings that the models were not trained with.
    """
    images, videos = _read(Path(folder))
    vision = shape.vision
    geometry = {
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
    }
    for name, settings in (("image", images), ("video", videos)):
        _check(settings, geometry, f"the {name} processor in {folder}")
    factor = vision.patch_size * vision.spatial_merge_size
    image_size = _size_rule(images, IMAGE_PIXELS, factor)
    image_size = replace(
        image_size,
        min_pixels=min_pixels or image_size.min_pixels,
        max_pixels=max_pixels or max(image_size.max_pixels, min_pixels),
    )
    if image_size.min_pixels > image_size.max_pixels:
        raise ValueError(
            f"the smallest image area {image_size.min_pixels} is above the largest {image_size.max_pixels}; "
            f"set data.min_pixels too"
        )
    defaults = shape.traits.videos
    video_pixels = {"shortest_edge": defaults.shortest_edge, "longest_edge": defaults.longest_edge}
    return VisionProcessor(
        family=shape.traits,
        **geometry,
        image_size=image_size,
        video_size=replace(_size_rule(videos, video_pixels, factor), clip=defaults.whole_clip),
        image_colours=_colours(images, CLIP_MEAN, CLIP_STD),
        video_colours=_colours(videos, defaults.mean, defaults.std),
        video_limits=VideoLimits(videos.get("min_frames") or 4, videos.get("max_frames") or 768),
    )


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings of the image and of the video processor, looked for in the order that transformers keeps."""
    both = _json(folder / "processor_config.json")
    for name in ("image_processor", "video_processor"):
        mapping(both.get(name) or {}, f"{folder / 'processor_config.json'}: {name}")
    images = both.get("image_processor") or _json(folder / "preprocessor_config.json")
    if not images:
        raise ValueError(
            f"no preprocessor_config.json in {folder}; copy the processor files of the model beside its config.json"
        )
    videos = both.get("video_processor") or _json(folder / "video_preprocessor_config.json") or images
    return images, videos


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    return mapping(content, str(file))


def _check(settings: dict[str, Any], geometry: dict[str, int], where: str) -> None:
    _check_types(settings, where)
    for name, wanted in geometry.items():
        if settings.get(name, wanted) != wanted:
            raise ValueError(
                f"{where} has {name} {settings[name]} but the model's config.json says {wanted}; "
                f"use the files that belong to the model"
            )
    for name in ("do_resize", "do_rescale", "do_normalize"):
        if settings.get(name) is False:
            raise ValueError(f"{where} has {name} false; RoboBrain models need it true")
    if (settings.get("resample") or BICUBIC) != BICUBIC:
        raise ValueError(f"{where} has resample {settings['resample']}; RoboBrain models use {BICUBIC}, bicubic")


def _check_types(settings: dict[str, Any], where: str) -> None:
    size = mapping(settings.get("size") or {}, f"{where}: size")
    areas = {f"size.{name}": size.get(name) for name in ("shortest_edge", "longest_edge")}
    counts = {name: settings.get(name) for name in ("min_pixels", "max_pixels", "min_frames", "max_frames")}
    for name, value in {**areas, **counts}.items():
        if value:
            check_type(value, 1, f"{where}: {name}")
    if settings.get("rescale_factor"):
        check_type(settings["rescale_factor"], 1.0, f"{where}: rescale_factor")
    for name in ("image_mean", "image_std"):
        values = settings.get(name) or [1.0] * 3
        if (
            not isinstance(values, list)
            or len(values) != 3
            or not all(isinstance(item, (int, float)) for item in values)
        ):
            raise ValueError(f"{where}: {name} must be 3 numbers, one a channel, got {values!r}")


def _size_rule(settings: dict[str, Any], default: dict[str, int], factor: int) -> SizeRule:
    size = {**default, **{name: value for name, value in (settings.get("size") or {}).items() if value}}
    return SizeRule(
        factor,
        settings.get("min_pixels") or size["shortest_edge"],
        settings.get("max_pixels") or size["longest_edge"],
    )


def _colours(settings: dict[str, Any], mean: tuple[float, ...], std: tuple[float, ...]) -> Colours:
    return Colours(
        scale=settings.get("rescale_factor") or 1 / 255,
        mean=tuple(settings.get("image_mean") or mean),
        std=tuple(settings.get("image_std") or std),
    )


def _resize(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    height, width = size
    if (image.height, image.width) == (height, width):
        return np.asarray(image)
    return np.asarray(image.resize((width, height), resample=Image.Resampling.BICUBIC))
