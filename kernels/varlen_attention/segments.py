"""The borders of the sequences that lie one after the other in a packed batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch


@dataclass(frozen=True)
class Segments:
    """Where each packed sequence begins: on the host for slicing, on the device for kernels.

    Both are made on the host once a batch, so that no layer has to ask the device for a length.
    """

    borders: tuple[int, ...]
    """From 0 to the number of rows."""
    cu_seqlens: torch.Tensor
    """int32 `[segments + 1]`, the borders as kernels read them."""
    max_length: int

    @classmethod
    def of_lengths(cls, lengths: Sequence[int]) -> Segments:
        """Segments of these lengths, one after the other."""
        borders = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        return cls(tuple(borders.tolist()), torch.from_numpy(borders), max(lengths, default=0))

    @property
    def lengths(self) -> list[int]:
        return [stop - start for start, stop in pairwise(self.borders)]

    def slices(self) -> list[slice]:
        """The rows of every segment."""
        return [slice(start, stop) for start, stop in pairwise(self.borders)]

    def check_covers(self, rows: int, name: str) -> None:
        """Raises ValueError unless the segments begin at 0, never run backwards and end at the last of `rows` rows."""
        if self.borders[0] != 0 or self.borders[-1] != rows:
            raise ValueError(
                f"{name} go from {self.borders[0]} to {self.borders[-1]}; they must cover all {rows} rows, from 0 on"
            )
        for start, stop in pairwise(self.borders):
            if stop < start:
                raise ValueError(f"{name} have the border {stop} after {start}; borders must not fall")

    def to(self, device: torch.device, non_blocking: bool = False) -> Segments:
        return replace(self, cu_seqlens=self.cu_seqlens.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Segments:
        return replace(self, cu_seqlens=self.cu_seqlens.pin_memory())
