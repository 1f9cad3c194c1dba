"""The samples of a rehearsal: drawn from a mix, with pictures that nobody paints."""

from __future__ import annotations

import numpy as np
import torch

from megatron_rb.data.mixes import Mix
from megatron_rb.data.mock_samples import MockSamples
from megatron_rb.data.sample import VisionGrid
from megatron_rb.models import inputs
from megatron_rb.rehearsal.stand_ins import StandIns
from megatron_rb.shapes.shape import RoboBrainShape


class UnpaintedSamples(MockSamples):
    """As `MockSamples`, with one value for all pixels, which takes no memory."""

    def __init__(self, mix: Mix, shape: RoboBrainShape) -> None:
        super().__init__(mix, shape)
        self._one = np.zeros((1, shape.vision.patch_dim), np.float32)

    def _pixels(self, draw: np.random.Generator, grid: VisionGrid) -> np.ndarray:
        return np.broadcast_to(self._one, (grid.patches, self._one.shape[1]))


def stand_in_for_pixels(stand_ins: StandIns) -> None:
    """Batches get memory for their pixels that is never written, so that it takes none."""
    stand_ins.set(
        inputs, "_ordered_pixels", lambda pixels, orders, unit, shape: torch.empty(shape, dtype=torch.float32)
    )
    stand_ins.set(inputs, "_rounded", lambda pixels, dtype: torch.empty_like(pixels, dtype=dtype))
