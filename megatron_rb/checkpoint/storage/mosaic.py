"""Stored tensors cut and put together by arithmetic on the places of their bytes; nothing is read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

from megatron_rb.checkpoint.storage.tensors import StoredChunk, StoredTensor

CHUNK_LIMIT = 1 << 20
"""Separate pieces of one tensor that are still described."""


def strided_chunks(
    shape: tuple[int, ...], strides: tuple[int, ...], path: Path, position: int, itemsize: int
) -> Iterator[StoredChunk]:
    """Largest parts of a strided tensor (strides in elements) whose elements follow each other in the file.

    Raises:
        ValueError: there are more than `CHUNK_LIMIT`.
    """
    if not math.prod(shape):
        return
    sizes, run = [1] * len(shape), 1
    for dim in reversed(range(len(shape))):
        if shape[dim] == 1:
            continue
        if strides[dim] == run:
            sizes[dim], run = shape[dim], run * shape[dim]
        elif run > 1:
            break
    outer = [range(0, length, size) for length, size in zip(shape, sizes, strict=True)]
    if math.prod(map(len, outer)) > CHUNK_LIMIT:
        raise ValueError(
            f"{path}: a tensor of shape {shape} with strides {strides} lies there in more than {CHUNK_LIMIT} pieces; "
            "save it with contiguous()"
        )
    for offsets in product(*outer):
        element = sum(index * step for index, step in zip(offsets, strides, strict=True))
        yield StoredChunk(tuple(offsets), tuple(sizes), path, position + element * itemsize)


def cropped(tensor: StoredTensor, start: tuple[int, ...], sizes: tuple[int, ...]) -> StoredTensor:
    """The box of `sizes` that begins at the index `start`."""
    chunks: list[StoredChunk] = []
    for chunk in tensor.chunks:
        low = tuple(max(a, b) for a, b in zip(chunk.offsets, start, strict=True))
        ends = zip(chunk.offsets, chunk.sizes, start, sizes, strict=True)
        high = tuple(min(a + size_a, b + size_b) for a, size_a, b, size_b in ends)
        if any(a >= b for a, b in zip(low, high, strict=True)):
            continue
        strides = _row_major(chunk.sizes)
        first = sum((a - b) * step for a, b, step in zip(low, chunk.offsets, strides, strict=True))
        inside = tuple(b - a for a, b in zip(low, high, strict=True))
        position = chunk.position + first * tensor.dtype.itemsize
        shift = tuple(a - b for a, b in zip(low, start, strict=True))
        for piece in strided_chunks(inside, strides, chunk.path, position, tensor.dtype.itemsize):
            chunks.append(_moved(piece, shift))
    return StoredTensor(tensor.name, tensor.dtype, sizes, tuple(chunks))


def joined(name: str, shape: tuple[int, ...], parts: Sequence[tuple[StoredTensor, tuple[int, ...]]]) -> StoredTensor:
    """One tensor of parts of the same type, each with the index where it begins.

    Raises:
        ValueError: the parts overlap or leave a gap.
    """
    chunks = tuple(_moved(chunk, offset) for part, offset in parts for chunk in part.chunks)
    whole = StoredTensor(name, parts[0][0].dtype, shape, chunks)
    whole.check_cover()
    return whole


def reshaped(tensor: StoredTensor, shape: tuple[int, ...]) -> StoredTensor:
    """The same elements in another shape.

    Raises:
        ValueError: the numbers of elements differ, or the tensor does not lie in one piece.
    """
    if tensor.shape == shape:
        return tensor
    if math.prod(tensor.shape) != math.prod(shape) or len(tensor.chunks) != 1:
        raise ValueError(f"{tensor.name}: {tensor.shape} in {len(tensor.chunks)} pieces cannot be seen as {shape}")
    chunk = replace(tensor.chunks[0], offsets=(0,) * len(shape), sizes=shape)
    return StoredTensor(tensor.name, tensor.dtype, shape, (chunk,))


def run_of(buffer: StoredTensor, start: int, shape: tuple[int, ...]) -> StoredTensor:
    """Elements of a one-dimensional tensor from `start` on, seen in a shape."""
    return reshaped(cropped(buffer, (start,), (math.prod(shape),)), shape)


def _moved(chunk: StoredChunk, shift: tuple[int, ...]) -> StoredChunk:
    return replace(chunk, offsets=tuple(a + b for a, b in zip(chunk.offsets, shift, strict=True)))


def _row_major(sizes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(sizes[dim + 1 :]) for dim in range(len(sizes)))
