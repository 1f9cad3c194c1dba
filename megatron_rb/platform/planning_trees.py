"""Objects that go to rank 0 and back along trees, when a checkpoint is planned.

torch sends them straight to rank 0, which then has a connection to every rank of the world. In a binomial tree nobody
has more than log2(ranks) of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.utils import _DistWrapper

T = TypeVar("T")
HOST = torch.device("cpu")


class PlanningTrees(_DistWrapper):
    """What torch's planner of checkpoints exchanges, along trees whose root is the first rank of the group."""

    def gather_object(self, object: T) -> list[T] | None:
        if not self._has_tree():
            return super().gather_object(object)
        return gather_to_first(object, self.group)

    def scatter_object(self, object_list: list[T] | None) -> T:
        if not self._has_tree():
            return super().scatter_object(object_list)
        return scatter_from_first(object_list, self.group)

    def _has_tree(self) -> bool:
        return self.use_dist and self.coordinator_rank == 0


def gather_to_first(value: T, group: dist.ProcessGroup | None = None) -> list[T] | None:
    """The values of all ranks, by rank in the group, on its first rank; None on the others."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    mine = {rank: value}
    for step in _steps(size):
        if rank & step:
            _send(mine, rank - step, group)
            return None
        if rank + step < size:
            mine |= _receive(rank + step, group)
    return [mine[each] for each in range(size)]


def scatter_from_first(values: Sequence[T] | None, group: dist.ProcessGroup | None = None) -> T:
    """The value that the first rank of the group has for this one.

    Args:
        values: by rank in the group; None on all but the first.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    mine: dict[int, T] = dict(enumerate(values or ()))
    for step in reversed(list(_steps(size))):
        if rank & (step - 1):
            continue  # it gets its own in a later step
        if rank & step:
            mine = _receive(rank - step, group)
        elif rank + step < size:
            _send({each: mine[each] for each in range(rank + step, min(rank + 2 * step, size))}, rank + step, group)
    return mine[rank]


def _steps(size: int) -> Iterator[int]:
    """1, 2, 4, ... below the size."""
    step = 1
    while step < size:
        yield step
        step *= 2


def _send(values: dict[int, Any], to: int, group: dist.ProcessGroup | None) -> None:
    dist.send_object_list([values], dst=_of_world(to, group), group=group, device=HOST)


def _receive(sender: int, group: dist.ProcessGroup | None) -> dict[int, Any]:
    values: list[Any] = [None]
    dist.recv_object_list(values, src=_of_world(sender, group), group=group, device=HOST)
    return values[0]


def _of_world(rank: int, group: dist.ProcessGroup | None) -> int:
    return rank if group is None else dist.get_global_rank(group, rank)
