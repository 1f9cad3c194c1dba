"""Random samples for parity runs: no tokenizer, no images on disk, every kind of input the models take."""

from __future__ import annotations

import numpy as np

from megatron_rb.data.sample import EncodedSample, VisionGrid
from megatron_rb.models.inputs import IGNORED
from megatron_rb.shapes.families import VideoTime
from megatron_rb.shapes.shape import RoboBrainShape

KINDS: tuple[tuple[str, ...], ...] = (("image",), (), ("image", "image", "image"), ("video",), ("image", "video"))
"""Media of the samples that are drawn: one image, text only, several images, a video, both."""


def draw_samples(shape: RoboBrainShape, seed: int, scale: int = 1) -> list[EncodedSample]:
    """One sample per entry of KINDS, with image sizes, token ids and labels drawn at random.

    Args:
        scale: multiplies image sides; larger values reach several attention windows and more positions.
    """
    draw = np.random.default_rng(seed)
    return [_sample(shape, draw, f"drawn-{number}", kinds, scale) for number, kinds in enumerate(KINDS)]


def _sample(
    shape: RoboBrainShape, draw: np.random.Generator, name: str, kinds: tuple[str, ...], scale: int
) -> EncodedSample:
    ids = _words(shape, draw, 4)
    grids, pixels = [], []
    for kind in kinds:
        grid = _grid(shape, draw, kind, scale)
        grids.append(grid)
        pixels.append(draw.standard_normal((grid.patches, shape.vision.patch_dim)).astype(np.float32))
        ids += _placeholders(shape, draw, grid) + _words(shape, draw, 3)
    prompt = len(ids)
    ids += _words(shape, draw, 6)
    labels = np.array(ids)
    labels[:prompt] = IGNORED
    return EncodedSample(name, np.array(ids, dtype=np.int32), labels.astype(np.int32), tuple(grids), pixels)


def _grid(shape: RoboBrainShape, draw: np.random.Generator, kind: str, scale: int) -> VisionGrid:
    merge = shape.vision.spatial_merge_size
    height, width = (merge * scale * int(side) for side in draw.integers(1, 6, size=2))
    if kind == "image":
        return VisionGrid(1, height, width, kind)
    seconds = float(draw.choice([0.5, 1.0, 1.5])) if shape.vision.tokens_per_second else 0.0
    return VisionGrid(int(draw.integers(2, 4)), height, width, kind, seconds)


def _placeholders(shape: RoboBrainShape, draw: np.random.Generator, grid: VisionGrid) -> list[int]:
    start, end = [shape.vision_start_token_id], [shape.vision_end_token_id]
    tokens = grid.patches // shape.vision.merge_unit
    if grid.kind == "image":
        return start + [shape.image_token_id] * tokens + end
    if shape.traits.video_time is not VideoTime.TEXT:
        return start + [shape.video_token_id] * tokens + end
    frame = start + [shape.video_token_id] * (tokens // grid.t) + end
    return [token for _ in range(grid.t) for token in _words(shape, draw, 2) + frame]


def _words(shape: RoboBrainShape, draw: np.random.Generator, count: int) -> list[int]:
    special = {shape.image_token_id, shape.video_token_id, shape.vision_start_token_id, shape.vision_end_token_id}
    ids: list[int] = []
    while len(ids) < count:
        token = int(draw.integers(0, shape.text.vocab_size))
        if token not in special:
            ids.append(token)
    return ids
