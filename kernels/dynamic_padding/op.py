"""Movements of rows between packed, padded and merged tensors, with mirrored backward passes and no host sync.

Gather pads, packs and unpacks (`row_map.padding`, `row_map.unpacking`); merge builds the decoder's input from text rows
and vision rows; add brings DeepStack features to the rows of their tokens. All indices come from the host (`RowMap`).
"""

from __future__ import annotations

import torch

from megatron_rb.kernels.dispatch import Call, choose
from megatron_rb.kernels.dynamic_padding.row_map import RowMap


def gather_rows(source: torch.Tensor, where: RowMap, implementation: str = "auto") -> torch.Tensor:
    """`[num_rows, ...]`: each row the source row the map names, or zeros.

    Args:
        source: `[num_sources, ...]`.

    Raises:
        ValueError: source and map do not fit, or the implementation cannot run here.
    """
    _check("source", source, where.num_sources)
    if _chosen(source, implementation) == "triton":
        return _moved(source, source, where, "gather")
    out = source.new_zeros(where.num_rows, *source.shape[1:])
    return out.index_copy(0, where.rows, source.index_select(0, where.sources))


def merge_rows(base: torch.Tensor, source: torch.Tensor, where: RowMap, implementation: str = "auto") -> torch.Tensor:
    """`base` with the rows the map names replaced by rows of `source`.

    Args:
        base: `[num_rows, ...]`; source: `[num_sources, ...]`, converted to the type of base.

    Raises:
        ValueError: as `gather_rows`.
    """
    _check_pair(base, source, where)
    if _chosen(base, implementation) == "triton":
        return _moved(source.to(base.dtype), base, where, "merge")
    return base.index_copy(0, where.rows, source.index_select(0, where.sources).to(base.dtype))


def add_rows(base: torch.Tensor, source: torch.Tensor, where: RowMap, implementation: str = "auto") -> torch.Tensor:
    """`base` with rows of `source` added to the rows the map names.

    Args:
        base: `[num_rows, ...]`; source: `[num_sources, ...]`, converted to the type of base.

    Raises:
        ValueError: as `gather_rows`.
    """
    _check_pair(base, source, where)
    if _chosen(base, implementation) == "triton":
        return _moved(source.to(base.dtype), base, where, "add")
    return base.index_add(0, where.rows, source.index_select(0, where.sources).to(base.dtype))


def _chosen(x: torch.Tensor, implementation: str) -> str:
    return choose("dynamic_padding", x.device, Call(x.dtype), implementation)


def _moved(source: torch.Tensor, base: torch.Tensor, where: RowMap, mode: str) -> torch.Tensor:
    flat = (x.contiguous().view(x.shape[0], source.shape[1:].numel()) for x in (source, base))
    return _Moved.apply(*flat, where.index, where.inverse, mode).view(where.num_rows, *source.shape[1:])


class _Moved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, source, base, index, inverse, mode: str):
        from megatron_rb.kernels.dynamic_padding.triton_impl import move_rows  # triton is optional

        ctx.save_for_backward(index, inverse)
        ctx.mode = mode
        return move_rows(source, base, index, mode)

    @staticmethod
    def backward(ctx, grad):
        from megatron_rb.kernels.dynamic_padding.triton_impl import move_rows

        index, inverse = ctx.saved_tensors
        grad = grad.contiguous()
        source_grad = move_rows(grad, grad, inverse, "gather") if ctx.needs_input_grad[0] else None
        base_grad = None
        if ctx.needs_input_grad[1] and ctx.mode != "gather":
            base_grad = grad if ctx.mode == "add" else move_rows(grad, grad, index, "mask")
        return source_grad, base_grad, None, None, None


def _check(name: str, x: torch.Tensor, rows: int) -> None:
    if x.dim() < 2 or x.shape[0] != rows:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; the map needs [{rows}, ...] of at least two dimensions")


def _check_pair(base: torch.Tensor, source: torch.Tensor, where: RowMap) -> None:
    _check("base", base, where.num_rows)
    _check("source", source, where.num_sources)
    if base.shape[1:] != source.shape[1:]:
        raise ValueError(
            f"source has rows of {tuple(source.shape[1:])} and base of {tuple(base.shape[1:])}; equal needed"
        )
