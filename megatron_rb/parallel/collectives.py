"""Small exchanges between ranks: values that travel as objects, and tensors of equal shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def wait_for_all() -> None:
    """Return when every rank of the world has called this."""
    dist.barrier()


def gather_from_all(value: T) -> list[T]:
    """The values of all ranks, by rank; every rank calls this."""
    values: list[T] = [None] * dist.get_world_size()  # type: ignore[list-item]
    dist.all_gather_object(values, value)
    return values


def rank_zero_first(action: Callable[[], T]) -> T:
    """Run an action on rank 0, then on all others; an error of rank 0 is raised everywhere and stops the others."""
    failure: list[Exception | None] = [None]
    value = None
    if dist.get_rank() == 0:
        try:
            value = action()
        except (ValueError, OSError) as error:
            failure[0] = error
    dist.broadcast_object_list(failure, src=0, device=torch.device("cpu"))
    if failure[0] is not None:
        raise failure[0]
    return action() if dist.get_rank() else value  # type: ignore[return-value]


def gather_over(local: torch.Tensor, group: dist.ProcessGroup) -> list[torch.Tensor]:
    """The tensor of all ranks of a group, of the same shape on each."""
    shards = [torch.empty_like(local) for _ in range(group.size())]
    dist.all_gather(shards, local.contiguous(), group=group)
    return shards
