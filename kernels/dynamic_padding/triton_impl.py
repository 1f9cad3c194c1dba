"""One Triton kernel for every movement of rows: gather, merge, add, and what their backward passes need."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megatron_rb.kernels.triton_math import narrow

BLOCK_BYTES = 8192
WARPS = 1
"""One warp for a whole row of a model: sixteen loads wait together behind the one of the index, and many rows fit."""
MODES = {"gather": 0, "merge": 1, "add": 2, "mask": 3}


@triton.jit
def _rows_kernel(source, base, out, index, width, MODE: tl.constexpr, BLOCK: tl.constexpr):
    """See `reference.move_rows`; one program writes one block of one row."""
    # Rows on the first axis: the others end at 65535.
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    origin = tl.load(index + row).to(tl.int64)
    taken = origin >= 0
    if MODE == 3:
        value = tl.load(base + row * width + column, inside & (origin < 0), other=0.0)
    else:
        value = tl.load(source + origin * width + column, inside & taken, other=0.0)
    if MODE == 1:
        kept = tl.load(base + row * width + column, inside & (origin < 0), other=0.0)
        value = tl.where(taken, value, kept)
    if MODE == 2:
        # fp32 also where rows are not added to, for a conversion there and back changes nothing.
        value = value.to(tl.float32) + tl.load(base + row * width + column, inside, other=0.0).to(tl.float32)
        tl.store(out + row * width + column, narrow(value, out.dtype.element_ty), inside)
    else:
        tl.store(out + row * width + column, value, inside)


@torch.library.custom_op("megatron_rb::move_rows", mutates_args=())
def move_rows(source: torch.Tensor, base: torch.Tensor, index: torch.Tensor, mode: str) -> torch.Tensor:
    """See `reference.move_rows`; all tensors contiguous."""
    width = source.shape[1]
    out = torch.empty(index.shape[0], width, dtype=source.dtype, device=source.device)
    if out.numel():
        block = BLOCK_BYTES // out.element_size()
        grid = (index.shape[0], triton.cdiv(width, block))
        _rows_kernel[grid](source, base, out, index, width, MODE=MODES[mode], BLOCK=block, num_warps=WARPS)
    return out


@move_rows.register_fake
def _(source, base, index, mode):
    return source.new_empty(index.shape[0], source.shape[1])
