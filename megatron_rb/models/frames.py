"""Which images and video frames a context-parallel rank computes, and where their merged tokens then stand.

Attention in the ViT never leaves a frame, so frames can be computed anywhere. A rank computes its own through all
vision blocks; the mergers' rows of all ranks, rank by rank, are what the language model takes its visual tokens from.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_rb.data.packing import share_out
from megatron_rb.data.sample import VisionGrid
from megatron_rb.models.positions import window_order

STEPS_OF_A_SHARE = 8
"""Padded sizes between a rank's share of a bucket and the whole bucket, for ranks with more than their share."""


@dataclass(frozen=True)
class FrameShares:
    """The frames of a micro-batch and the rank of each."""

    grids: tuple[VisionGrid, ...]
    owners: tuple[np.ndarray, ...]
    """For each grid int `[t]`: the context-parallel rank of every frame."""
    cp_size: int

    @classmethod
    def of(cls, grids: Sequence[VisionGrid], cp_size: int) -> FrameShares:
        """Largest frames first, each to the rank with the fewest patches so far."""
        patches = np.array([grid.h * grid.w for grid in grids for _ in range(grid.t)], dtype=np.int64)
        owners = np.array(share_out(patches, cp_size), dtype=np.int64)
        ends = np.cumsum([grid.t for grid in grids], dtype=np.int64)
        return cls(tuple(grids), tuple(np.split(owners, ends[:-1])) if grids else (), cp_size)

    def most_patches(self) -> int:
        """Patches of the rank with the most."""
        loads = np.zeros(self.cp_size, dtype=np.int64)
        for grid, owners in zip(self.grids, self.owners, strict=True):
            loads += np.bincount(owners, minlength=self.cp_size) * grid.h * grid.w
        return int(loads.max())

    def padded_patches(self, wanted: int, multiple: int) -> int:
        """Rows that every rank pads its patches to, a multiple of `multiple`.

        Args:
            wanted: rows of the whole micro-batch to pad to, where it has fewer.
        """
        most, share = max(self.most_patches(), 1), -(-wanted // self.cp_size)
        if most > share > 0 and self.cp_size > 1:
            step = -(-share // STEPS_OF_A_SHARE)
            most += -most % step
        return _up(max(most, share), multiple)

    def grids_of(self, rank: int) -> list[VisionGrid]:
        """The frames of a rank; a video of which it has some is shorter there."""
        counts = [int((owners == rank).sum()) for owners in self.owners]
        return [replace(grid, t=count) for grid, count in zip(self.grids, counts, strict=True) if count]

    def pixels_of(self, rank: int, pixels: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The patches of `grids_of`.

        Args:
            pixels: for each grid `[t * h * w, patch_dim]`.
        """
        mine = [owners == rank for owners in self.owners]
        return [
            array if taken.all() else array.reshape(len(taken), -1, array.shape[1])[taken].reshape(-1, array.shape[1])
            for array, taken in zip(pixels, mine, strict=True)
            if taken.any()
        ]

    def merged_rows(self, merge: int, window: int, rows_of_rank: int) -> np.ndarray:
        """For every merged token in reading order its row among those of all ranks, int64.

        Args:
            window: side of an attention window in merged tokens, in whose order a rank's rows stand; 0 = no windows.
            rows_of_rank: merged tokens of each rank, padding included.
        """
        free = np.arange(self.cp_size, dtype=np.int64) * rows_of_rank
        rows = [np.zeros(0, dtype=np.int64)]
        for grid, owners in zip(self.grids, self.owners, strict=True):
            place = np.argsort(frame_order(grid.h, grid.w, merge, window)[0])
            for rank in owners.tolist():
                rows.append(free[rank] + place)
                free[rank] += len(place)
        return np.concatenate(rows)


@functools.lru_cache(maxsize=512)
def frame_order(height: int, width: int, merge: int, window: int) -> tuple[np.ndarray, tuple[int, ...]]:
    """`window_order` of one frame of so many patches, read only; without windows the reading order and no lengths."""
    lengths: list[int] = []
    if window:
        order, lengths = window_order(VisionGrid(1, height, width, "image"), merge, window)
    else:
        order = np.arange(height * width // merge**2)
    order.flags.writeable = False
    return order, tuple(lengths)


def _up(rows: int, multiple: int) -> int:
    return rows + -rows % multiple
