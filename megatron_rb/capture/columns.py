"""Which features of a whole tensor the tensor of one tensor-parallel rank holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_rb.capture.files import Columns
from megatron_rb.parallel.mesh import Mesh
from megatron_rb.parallel.sharding import ShardSpec


@dataclass(frozen=True)
class LocalColumns:
    """All columns, whole heads of each rank, or the ranges of a sharded dimension."""

    ranges: Columns | None = None
    """Global ranges; None = all, or heads."""
    local: tuple[tuple[int, int], ...] = ()
    """Start and length of the real columns in the local tensor; empty = there is no padding."""
    heads: bool = False

    @classmethod
    def of_spec(cls, spec: ShardSpec, mesh: Mesh) -> LocalColumns:
        """The part of a sharded dimension on a rank."""
        if spec.dim is None or mesh.tp_size == 1:
            return cls()
        start, stop = spec.rank_range(mesh.tp_rank, mesh.tp_size)
        width = spec.rank_size(mesh.tp_size)
        ranges = [(part * spec.part_size() + start, stop - start) for part in range(spec.stride)]
        return cls(ranges, tuple((part * width, stop - start) for part in range(spec.stride)))

    @property
    def same_everywhere(self) -> bool:
        """Every rank holds all columns."""
        return self.ranges is None and not self.heads

    def cut(self, piece: torch.Tensor) -> torch.Tensor:
        """Leave padding out."""
        if not self.local:
            return piece
        return torch.cat([piece.narrow(1, start, length) for start, length in self.local], dim=1)

    def ranges_of(self, width: int, tp_rank: int) -> Columns | None:
        """Global ranges of a piece without padding."""
        return [(tp_rank * width, width)] if self.heads else self.ranges
