"""The grid of ranks of a run: which rank stands where, by one formula for the launcher and for every process."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

AXES = ("tp", "cp", "dp", "pp")
"""The parallel axes, the one whose neighbours have neighbouring ranks first: the order of megatron-core."""


@dataclass(frozen=True)
class RankCoordinates:
    """Where a rank stands on every axis of `AXES`, in their order."""

    tp: int
    cp: int
    dp: int
    pp: int


@dataclass(frozen=True)
class RankGrid:
    """Degrees on the axes of `AXES`."""

    tp_size: int = 1
    cp_size: int = 1
    dp_size: int = 1
    pp_size: int = 1

    @classmethod
    def of_world(cls, world_size: int, tp_size: int = 1, pp_size: int = 1, cp_size: int = 1) -> RankGrid:
        """The grid of so many processes; what tensor, pipeline and context parallelism leave over is data parallel.

        Raises:
            ValueError: the world size is not a multiple of tp_size x pp_size x cp_size.
        """
        replica = tp_size * pp_size * cp_size
        if world_size % replica:
            raise ValueError(
                f"{world_size} processes cannot be split into tp_size {tp_size} x pp_size {pp_size} x cp_size "
                f"{cp_size}; start a multiple of {replica}"
            )
        return cls(tp_size, cp_size, world_size // replica, pp_size)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Degrees in the order of `AXES`."""
        return self.tp_size, self.cp_size, self.dp_size, self.pp_size

    @property
    def world_size(self) -> int:
        return self.tp_size * self.cp_size * self.dp_size * self.pp_size

    def coordinates(self, rank: int) -> RankCoordinates:
        """Where a rank stands; the inverse of `rank`."""
        rank, tp = divmod(rank, self.tp_size)
        rank, cp = divmod(rank, self.cp_size)
        pp, dp = divmod(rank, self.dp_size)
        return RankCoordinates(tp, cp, dp, pp % self.pp_size)

    def rank(self, coordinates: RankCoordinates) -> int:
        """The rank at coordinates."""
        at = coordinates
        return ((at.pp * self.dp_size + at.dp) * self.cp_size + at.cp) * self.tp_size + at.tp

    def group(self, rank: int, *axes: str) -> tuple[int, ...]:
        """The ranks that differ from one in nothing but their place on some axes, that one included, sorted."""
        own = self.coordinates(rank)
        free = [range(self._size(axis)) if axis in axes else (getattr(own, axis),) for axis in AXES]
        return tuple(sorted(self.rank(RankCoordinates(*places)) for places in product(*free)))

    def groups(self, *axes: str) -> tuple[tuple[int, ...], ...]:
        """The groups of all ranks over some axes, each once, by their first rank."""
        found: list[tuple[int, ...]] = []
        grouped: set[int] = set()
        for rank in range(self.world_size):
            if rank not in grouped:
                found.append(self.group(rank, *axes))
                grouped.update(found[-1])
        return tuple(found)

    def _size(self, axis: str) -> int:
        return self.sizes[AXES.index(axis)]
