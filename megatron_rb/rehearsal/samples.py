"""The samples of a rehearsal: drawn from a mix or from the sizes of data, with pictures that nobody paints."""

from __future__ import annotations

import math

import numpy as np
import torch

from megatron_rb.data.mixes import Mix
from megatron_rb.data.mock_samples import STREAM, MockSamples
from megatron_rb.data.sample import VisionGrid
from megatron_rb.models import inputs
from megatron_rb.planner.histogram import Histogram
from megatron_rb.rehearsal.stand_ins import StandIns
from megatron_rb.shapes.shape import RoboBrainShape


class UnpaintedSamples(MockSamples):
    """As `MockSamples`, with one value for all pixels, which takes no memory.

    Args:
        histogram: sizes of samples, as `rb data stats` writes them, which are drawn in place of those of the mix.
    """

    def __init__(self, mix: Mix, shape: RoboBrainShape, histogram: Histogram | None = None) -> None:
        self.histogram = histogram
        super().__init__(mix, shape)
        self._one = np.zeros((1, shape.vision.patch_dim), np.float32)

    def _drawn(self) -> tuple[list[int], list[tuple[VisionGrid, ...]]]:
        if self.histogram is None:
            return super()._drawn()
        draw = np.random.default_rng([STREAM, self.mix.seed])
        share = self.histogram.counts / self.histogram.num_samples
        bins = draw.choice(len(share), size=self.mix.samples, p=share)
        side = self.shape.vision.spatial_merge_size
        text = [max(1, int(self.histogram.text_tokens[number])) for number in bins]
        return text, [_picture(int(self.histogram.patches[number]), side) for number in bins]

    def _source(self) -> str:
        return super()._source() if self.histogram is None else f"the data of {self.histogram.source}"

    def _pixels(self, draw: np.random.Generator, grid: VisionGrid) -> np.ndarray:
        return np.broadcast_to(self._one, (grid.patches, self._one.shape[1]))


def _picture(patches: int, side: int) -> tuple[VisionGrid, ...]:
    """One picture of at most so many patches, about as high as it is wide; none for no patches."""
    cells = patches // side**2
    if not cells:
        return ()
    height = math.isqrt(cells)
    return (VisionGrid(1, height * side, cells // height * side, "image"),)


def stand_in_for_pixels(stand_ins: StandIns) -> None:
    """Batches get memory for their pixels that is never written, so that it takes none."""
    stand_ins.set(
        inputs, "_ordered_pixels", lambda pixels, orders, unit, shape: torch.empty(shape, dtype=torch.float32)
    )
    stand_ins.set(inputs, "_rounded", lambda pixels, dtype: torch.empty_like(pixels, dtype=dtype))
