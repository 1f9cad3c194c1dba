"""The values of matrices that are stored as fp8 with a factor for each block, some rows at a time."""

from __future__ import annotations

import torch

from megatron_rb.checkpoint.storage.tensors import BLOCK_BYTES, FilePool, StoredTensor, as_bytes, row_blocks

ROW_BYTES_LIMIT = BLOCK_BYTES // 4
"""Bytes of fp8 that are multiplied at a time: the products take four times as many."""


def scaled_rows(pool: FilePool, tensor: StoredTensor, first: int, rows: torch.Tensor) -> torch.Tensor:
    """The rows of a tensor with block scales from row `first` on, multiplied in fp32.

    Args:
        rows: `[count, columns]` as stored.
    """
    assert tensor.scales is not None
    tall, wide = tensor.scales.block
    top, bottom = first // tall, -(-(first + len(rows)) // tall)
    stored = tensor.scales.tensor
    factors = torch.empty((bottom - top, *stored.shape[1:]), dtype=stored.dtype)
    pool.read_rows(stored, top, bottom - top, as_bytes(factors).data)
    block_of_column = torch.arange(rows.shape[1]) // wide
    block_of_row = torch.arange(first, first + len(rows)) // tall - top
    return rows.float() * factors.float()[:, block_of_column][block_of_row]


def read_values(pool: FilePool, tensor: StoredTensor) -> torch.Tensor:
    """The whole tensor in memory, in the type of its values."""
    if tensor.scales is None:
        return pool.read(tensor)
    values = torch.empty(tensor.shape, dtype=tensor.value_dtype)
    for start, count in row_blocks(tensor.num_rows, tensor.row_bytes, ROW_BYTES_LIMIT):
        rows = torch.empty((count, *tensor.shape[1:]), dtype=tensor.dtype)
        pool.read_rows(tensor, start, count, as_bytes(rows).data)
        values[start : start + count] = scaled_rows(pool, tensor, start, rows)
    return values
