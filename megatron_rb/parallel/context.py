"""What context-parallel ranks exchange: keys and values of earlier tokens, and visual rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel

from megatron_rb.layout.token_axis import Range


def gather_keys(
    k: torch.Tensor, v: torch.Tensor, ranges: Sequence[Range], group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of some ranges of the whole token axis; every context-parallel rank calls this.

    One all-gather, and one reduce-scatter of the gradients in the backward pass.

    Args:
        k, v: `[tokens / cp_size, groups, head_dim]`, the rows of this rank (`layout.token_axis`).
        ranges: one after the other in the result; a row may be in several of them.
        group: the context-parallel ranks.
    """
    return _GatherKeys.apply(k, v, tuple(ranges), group)


def gather_rows(local: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The rows of all context-parallel ranks, rank by rank; every one of them holds as many."""
    return tensor_parallel.gather_from_sequence_parallel_region(local, group=group)


class _GatherKeys(torch.autograd.Function):
    @staticmethod
    def forward(ctx, k, v, ranges: tuple[Range, ...], group: dist.ProcessGroup):
        local = torch.stack([k, v])
        ctx.ranges, ctx.group, ctx.shape = ranges, group, local.shape
        everyone = local.new_empty(group.size(), *local.shape)
        dist.all_gather_into_tensor(everyone.flatten(0, 1), local, group=group)
        pieces = list(_pieces(everyone, ranges))
        return tuple(torch.cat([piece[which] for piece in pieces]) for which in (0, 1))

    @staticmethod
    def backward(ctx, grad_k, grad_v):
        everyone = grad_k.new_zeros(ctx.group.size(), *ctx.shape)
        start = 0
        for piece in _pieces(everyone, ctx.ranges):
            stop = start + piece.shape[1]
            piece[0] += grad_k[start:stop]
            piece[1] += grad_v[start:stop]
            start = stop
        local = grad_k.new_empty(ctx.shape)
        dist.reduce_scatter_tensor(local, everyone.flatten(0, 1), group=ctx.group)
        return local[0], local[1], None, None


def _pieces(everyone: torch.Tensor, ranges: Sequence[Range]) -> Iterator[torch.Tensor]:
    """Views of the ranges in a tensor `[cp, 2, rows of a rank, ...]`, chunk by chunk."""
    size = everyone.shape[0]
    chunk = everyone.shape[2] // 2
    for start, stop in ranges:
        for index in range(start // chunk, -(-stop // chunk)):
            rank, half = (index, 0) if index < size else (2 * size - 1 - index, 1)
            first, last = max(start, index * chunk), min(stop, (index + 1) * chunk)
            offset = half * chunk - index * chunk
            yield everyone[rank, :, first + offset : last + offset]
