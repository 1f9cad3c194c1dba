"""One training sample as the model needs it: token ids, labels, image grids, patches."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

IGNORED = -100
"""Label of a token that no loss is taken on."""


@dataclass(frozen=True)
class VisionGrid:
    """Size of one image or video in patches."""

    t: int
    """Temporal grids: 1 for an image, frames / temporal_patch_size for a video."""
    h: int
    w: int
    kind: str
    """`image` or `video`."""
    second_per_grid: float = 0.0
    """Seconds between temporal grids of a video (Qwen2.5-VL); 0 when time is written as text."""

    @property
    def patches(self) -> int:
        return self.t * self.h * self.w


@dataclass
class EncodedSample:
    """A tokenised conversation with its images."""

    sample_id: str
    input_ids: np.ndarray
    """int32 `[tokens]`, image and video placeholders expanded to one per merged token."""
    labels: np.ndarray
    """int32 `[tokens]`, aligned with input_ids (not shifted); -100 where no loss is taken."""
    grids: tuple[VisionGrid, ...]
    """Images and videos in order of appearance in the sequence."""
    pixels: list[np.ndarray] | None
    """For each grid float32 `[t * h * w, patch_dim]` in merge-block order; None where pixels are not needed."""

    @property
    def num_patches(self) -> int:
        return sum(grid.patches for grid in self.grids)
