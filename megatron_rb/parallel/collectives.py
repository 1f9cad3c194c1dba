"""Small exchanges between ranks: values that travel as objects, and tensors of equal shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
KINDS: dict[str, type[Exception]] = {"ValueError": ValueError, "OSError": OSError, "RuntimeError": RuntimeError}
"""What errors of other ranks are raised as: wrong input, a machine that fails, everything else."""


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


def on_all(action: Callable[[], T]) -> T:
    """The result of an action of every rank; an error of one is raised on all of them, as `raise_together` does."""
    failure, value = None, None
    try:
        value = action()
    except Exception as error:  # whatever it is, the others wait for this rank
        failure = error
    raise_together(failure)
    return value  # type: ignore[return-value]


def raise_together(failure: Exception | None) -> None:
    """Raise on every rank what some of them met, in the words of the lowest; every rank of the world calls this.

    Args:
        failure: of this rank; None = nothing is wrong here.
    """
    if failure is not None and dist.get_world_size() == 1:
        raise failure
    fine = torch.tensor(int(failure is None), dtype=torch.int32)
    dist.all_reduce(fine, op=dist.ReduceOp.MIN)
    if int(fine):
        return
    told = gather_from_all(None if failure is None else (_kind(failure), str(failure)))
    rank, (kind, words) = next((rank, each) for rank, each in enumerate(told) if each is not None)
    raise KINDS[kind](f"{words} (rank {rank})") from failure


def _kind(failure: Exception) -> str:
    """The one of `KINDS` that an error is of; the last one takes all others."""
    return next((name for name, kind in KINDS.items() if isinstance(failure, kind)), next(reversed(KINDS)))


def gather_over(local: torch.Tensor, group: dist.ProcessGroup) -> list[torch.Tensor]:
    """The tensor of all ranks of a group, of the same shape on each."""
    shards = [torch.empty_like(local) for _ in range(group.size())]
    dist.all_gather(shards, local.contiguous(), group=group)
    return shards
