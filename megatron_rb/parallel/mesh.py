"""`Mesh`: the grid of ranks of a run as one rank sees it, with the process groups it is in as attributes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch.distributed as dist

from megatron_rb.layout.mesh import RankCoordinates, RankGrid


@dataclass(frozen=True)
class Mesh:
    """Degrees of the run, the coordinates of this rank and its process groups.

    One without groups describes a rank: it has every size and coordinate, and a KeyError for each group.
    """

    grid: RankGrid
    rank: int = 0
    vpp_size: int = 1
    """Chunks of the model on every pipeline rank."""
    groups: Mapping[str, dist.ProcessGroup] = field(default_factory=dict, repr=False, compare=False)
    """By axes: `tp`, `cp`, `pp`, `dp_cp`; `parallel.groups.build_mesh` makes them."""
    device_backend: str | None = field(default=None, compare=False)
    """Of groups in which only tensors on the device travel; None = that of the world."""

    @cached_property
    def at(self) -> RankCoordinates:
        return self.grid.coordinates(self.rank)

    @property
    def world_size(self) -> int:
        return self.grid.world_size

    @property
    def tp_size(self) -> int:
        return self.grid.tp_size

    @property
    def cp_size(self) -> int:
        return self.grid.cp_size

    @property
    def dp_size(self) -> int:
        return self.grid.dp_size

    @property
    def pp_size(self) -> int:
        return self.grid.pp_size

    @property
    def tp_rank(self) -> int:
        return self.at.tp

    @property
    def cp_rank(self) -> int:
        return self.at.cp

    @property
    def dp_rank(self) -> int:
        """Ranks of one replica have the same samples, and the same number here."""
        return self.at.dp

    @property
    def pp_rank(self) -> int:
        return self.at.pp

    @property
    def dp_cp_rank(self) -> int:
        """Number of this rank among those that hold the same weights: data- and context-parallel ones."""
        return self.grid.group(self.rank, "cp", "dp").index(self.rank)

    @property
    def first_pp_rank(self) -> int:
        """Global rank of the first pipeline stage beside this rank; it numbers the pipelines too."""
        return self.grid.rank(replace(self.at, pp=0))

    @property
    def last_pp_rank(self) -> int:
        """Global rank of the last pipeline stage beside this rank."""
        return self.grid.rank(replace(self.at, pp=self.pp_size - 1))

    @property
    def answering_rank(self) -> int:
        """Global rank of the first tensor-parallel rank of the last stage of this rank's copy of the model."""
        return self.grid.rank(replace(self.at, tp=0, pp=self.pp_size - 1))

    @property
    def tp_group(self) -> dist.ProcessGroup:
        return self.groups["tp"]

    @property
    def cp_group(self) -> dist.ProcessGroup:
        return self.groups["cp"]

    @property
    def pp_group(self) -> dist.ProcessGroup:
        return self.groups["pp"]

    @property
    def dp_cp_group(self) -> dist.ProcessGroup:
        """The ranks that hold the same weights, over which gradients are summed: data- and context-parallel ones."""
        return self.groups["dp_cp"]

    @property
    def name(self) -> str:
        """How this rank is called in messages: `rank 3 (tp 1, pp 1, dp 0)`."""
        context = f", cp {self.cp_rank}" if self.cp_size > 1 else ""
        return f"rank {self.rank} (tp {self.tp_rank}{context}, pp {self.pp_rank}, dp {self.dp_rank})"
