"""Samples drawn from a mix: no tokenizer, no files; the same samples on every rank and every machine."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from megatron_rb.data.mixes import Mix, SampleKind
from megatron_rb.data.sample import IGNORED, EncodedSample, VisionGrid
from megatron_rb.planner.histogram import Histogram, histogram_of
from megatron_rb.shapes.families import VideoTime
from megatron_rb.shapes.shape import RoboBrainShape

POOL_PATCHES = 4096
"""Rows of noise that pixels are copied from: drawing them anew would take longer than decoding pictures does."""
TIME_TOKENS = 6
"""Tokens that tell the time of a video frame where the model writes it as text."""
SPREAD = 0.8
"""Of the logarithm of text lengths."""
STREAM = 0x6D6F636B
"""Keeps these random numbers apart from those of the sampler, whose order would else follow the kinds of samples."""


class MockSamples:
    """A data set as `StepLoader` takes it. Sample n depends on the mix, the model and n alone.

    Raises:
        ValueError: a sample of the mix does not fit a micro-batch.
    """

    def __init__(self, mix: Mix, shape: RoboBrainShape) -> None:
        self.mix, self.shape = mix, shape
        self._text, self.grids = self._drawn()
        sizes = [
            (text + sum(num_tokens(shape, grid) for grid in grids), sum(grid.patches for grid in grids))
            for text, grids in zip(self._text, self.grids, strict=True)
        ]
        self.sizes = np.array(sizes, dtype=np.int64)
        self._check()
        noise = np.random.default_rng([STREAM, mix.seed])
        self._pool = noise.standard_normal((POOL_PATCHES, shape.vision.patch_dim), dtype=np.float32)

    def _drawn(self) -> tuple[list[int], list[tuple[VisionGrid, ...]]]:
        """Text tokens and media of every sample."""
        return _draw(self.mix, self.shape)

    def __len__(self) -> int:
        return self.mix.samples

    def get(self, number: int, *, with_pixels: bool) -> EncodedSample:
        draw = np.random.default_rng([STREAM, self.mix.seed, number])
        grids = self.grids[number]
        sample = draw_sample(self.shape, draw, f"mock-{number}", grids, self._text[number], self.mix.answer_share)
        sample.pixels = [self._pixels(draw, grid) for grid in grids] if with_pixels else None
        return sample

    def blank(self, number: int) -> EncodedSample:
        """As `get`: nothing here can be unreadable."""
        return self.get(number, with_pixels=True)

    def source(self, number: int) -> tuple[str, int]:
        return self.mix.name, number

    def _pixels(self, draw: np.random.Generator, grid: VisionGrid) -> np.ndarray:
        rows = np.arange(grid.patches) + int(draw.integers(POOL_PATCHES))
        return self._pool.take(rows, axis=0, mode="wrap")

    def _source(self) -> str:
        return f"mix '{self.mix.name}'"

    def _check(self) -> None:
        limits = np.array([self.mix.seq_length, self.mix.max_patches])
        over = np.flatnonzero((self.sizes > limits).any(axis=1))
        if over.size:
            tokens, patches = self.sizes[over].max(axis=0)
            raise ValueError(
                f"{over.size} of the {len(self)} samples of {self._source()} are over {limits[0]} tokens or "
                f"{limits[1]} patches of a micro-batch (the largest: {tokens} tokens, {patches} patches); raise "
                f"seq_length or max_patches, or draw smaller samples"
            )


def draw_sample(
    shape: RoboBrainShape,
    draw: np.random.Generator,
    name: str,
    grids: Sequence[VisionGrid],
    text: int,
    answer_share: float,
) -> EncodedSample:
    """Images and videos, then random text whose end is the answer; without pixels."""
    media = [_placeholders(shape, draw, grid) for grid in grids]
    ids = np.concatenate([*media, words(shape, draw, text)]).astype(np.int32)
    labels = np.full(len(ids), IGNORED, dtype=np.int32)
    answer = max(1, round(text * answer_share))
    labels[-answer:] = ids[-answer:]
    return EncodedSample(name, ids, labels, tuple(grids), None)


def num_tokens(shape: RoboBrainShape, grid: VisionGrid) -> int:
    """Tokens that `draw_sample` spends on an image or video, borders and times included."""
    visual = grid.patches // shape.vision.merge_unit
    return visual + (grid.t * (2 + TIME_TOKENS) if _has_written_times(shape, grid) else 2)


def words(shape: RoboBrainShape, draw: np.random.Generator, count: int) -> np.ndarray:
    """Random token ids, none of them special."""
    special = {shape.image_token_id, shape.video_token_id, shape.vision_start_token_id, shape.vision_end_token_id}
    ids = draw.integers(0, shape.text.vocab_size - len(special), size=count, dtype=np.int32)
    for token in sorted(special):
        ids += ids >= token  # moves the rest up by one, so that all plain ids stay equally likely
    return ids


def _has_written_times(shape: RoboBrainShape, grid: VisionGrid) -> bool:
    return grid.kind == "video" and shape.traits.video_time is VideoTime.TEXT


def _placeholders(shape: RoboBrainShape, draw: np.random.Generator, grid: VisionGrid) -> np.ndarray:
    visual = grid.patches // shape.vision.merge_unit
    pad = shape.image_token_id if grid.kind == "image" else shape.video_token_id
    start, end = shape.vision_start_token_id, shape.vision_end_token_id
    if not _has_written_times(shape, grid):
        return np.array([start, *[pad] * visual, end], dtype=np.int32)
    frame = np.array([start, *[pad] * (visual // grid.t), end], dtype=np.int32)
    times = words(shape, draw, grid.t * TIME_TOKENS).reshape(grid.t, TIME_TOKENS)
    return np.concatenate([np.append(time, frame) for time in times])


def _draw(mix: Mix, shape: RoboBrainShape) -> tuple[list[int], list[tuple[VisionGrid, ...]]]:
    """Text tokens and media of every sample."""
    draw = np.random.default_rng([STREAM, mix.seed])
    kinds = draw.choice(len(mix.kinds), size=mix.samples, p=[kind.share for kind in mix.kinds])
    text, grids = [], []
    for number in kinds.tolist():
        kind = mix.kinds[number]
        grids.append(_draw_media(kind, shape, draw))
        text.append(_draw_length(kind, draw))
    return text, grids


def _draw_length(kind: SampleKind, draw: np.random.Generator) -> int:
    least, median, most = kind.text_tokens
    return min(max(round(median * math.exp(SPREAD * draw.standard_normal())), least), most)


def _draw_media(kind: SampleKind, shape: RoboBrainShape, draw: np.random.Generator) -> tuple[VisionGrid, ...]:
    vision = shape.vision
    cell = vision.patch_size * vision.spatial_merge_size

    def side() -> int:
        pixels = int(draw.integers(kind.side[0], kind.side[1], endpoint=True))
        return max(1, round(pixels / cell)) * vision.spatial_merge_size

    images = int(draw.integers(*kind.images, endpoint=True))
    frames = int(draw.integers(*kind.frames, endpoint=True))
    media = [VisionGrid(1, side(), side(), "image") for _ in range(images)]
    if frames:
        seconds = 1.0 if vision.tokens_per_second else 0.0  # two frames per second
        media.append(VisionGrid(-(-frames // vision.temporal_patch_size), side(), side(), "video", seconds))
    return tuple(media)


def mix_histogram(mix: Mix, shape: RoboBrainShape) -> Histogram:
    """What the samples of a mix are like, as `rb data stats` tells it of files."""
    samples, unit = MockSamples(mix, shape), shape.vision.merge_unit
    tokens, patches = samples.sizes.T
    seen = [sum(grid.patches * grid.h * grid.w for grid in grids) for grids in samples.grids]
    source = f"{len(samples)} samples of the mix {mix.name} ({mix.about}), not of data"
    return histogram_of(tokens - patches // unit, patches, np.array(seen) / np.maximum(patches, 1), source)
