"""Norm weights that are stored as `gamma - 1`, raised by one in a file of their own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megatron_rb.checkpoint.storage.tensors import FilePool, StoredChunk, StoredTensor, as_bytes


def raise_by_one(
    tensors: Mapping[str, StoredTensor], file: Path, pool: FilePool
) -> tuple[dict[str, StoredTensor], float]:
    """Write `1 + weight` of every tensor to `file`, raw and one behind the other.

    The sum is taken in fp32 and rounded once to the tensor's own type.

    Returns:
        The new tensors by the same names, and the largest rounding error.
    """
    raised, largest = {}, 0.0
    with open(file, "wb") as out:
        for name, tensor in tensors.items():
            weight = pool.read(tensor)
            value = (weight.float() + 1).to(tensor.dtype)
            largest = max(largest, float((value.double() - (weight.double() + 1)).abs().max()))
            chunk = StoredChunk((0,) * len(tensor.shape), tensor.shape, file, out.tell())
            out.write(as_bytes(value.contiguous()).data)
            raised[name] = StoredTensor(tensor.name, tensor.dtype, tensor.shape, (chunk,))
    return raised, largest
