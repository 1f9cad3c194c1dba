"""Checksums of raw tensor bytes, and a count of NaNs and infinities, both taken while the bytes pass by."""

from __future__ import annotations

import numpy as np
import torch
import xxhash
from typing_extensions import Buffer

ALGORITHM = "xxh3-128"
_NAN_LIMITS = {
    # Bits of infinity, with the sign bit clear and set: anything above is a NaN.
    torch.float32: (np.int32, np.uint32, 0x7F800000, 0xFF800000),
    torch.bfloat16: (np.int16, np.uint16, 0x7F80, 0xFF80),
    torch.float16: (np.int16, np.uint16, 0x7C00, 0xFC00),
    torch.float64: (np.int64, np.uint64, 0x7FF0000000000000, 0xFFF0000000000000),
}


class Checksum:
    """XXH3-128 of the bytes given so far, in their order; the type and the shape of a tensor are not part of it."""

    def __init__(self) -> None:
        self._state = xxhash.xxh3_128()

    def update(self, block: Buffer) -> None:
        self._state.update(block)

    def hexdigest(self) -> str:
        return self._state.hexdigest()


def checksum(data: Buffer) -> str:
    """`Checksum` of one piece."""
    return xxhash.xxh3_128(data).hexdigest()


def count_not_finite(block: Buffer, dtype: torch.dtype) -> tuple[int, int]:
    """`(NaNs, infinities)` among the elements of a block; none for types that have none.

    Two maxima over integers are many times faster than comparing floats, and such values are rare: they are counted
    only where the maxima show one.
    """
    limits = _NAN_LIMITS.get(dtype)
    if limits is None or not memoryview(block).nbytes:
        return 0, 0
    signed, unsigned, positive, negative = limits
    as_signed, as_unsigned = np.frombuffer(memoryview(block), signed), np.frombuffer(memoryview(block), unsigned)
    if as_signed.max() < positive and as_unsigned.max() < negative:
        return 0, 0
    nans = int(((as_signed > positive) | (as_unsigned > negative)).sum())
    return nans, int(((as_signed == positive) | (as_unsigned == negative)).sum())
