"""`StoredTensor`: a tensor as the pieces of files that hold it, read in blocks of rows."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

import numpy as np
import torch

BLOCK_BYTES = 2 << 20
"""Bytes that are read, hashed and written at a time: large enough for a disk, small enough for a cache."""
INTEGERS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}
"""numpy type that moves elements of a size without touching their bits."""


class DamagedFile(ValueError):
    """A file is shorter than its own table of contents says, or is not what its name promises."""


@dataclass(frozen=True)
class StoredChunk:
    """A rectangular part of a tensor that lies in one file without gaps, in row-major order, little-endian."""

    offsets: tuple[int, ...]
    """Index of its first element in the tensor."""
    sizes: tuple[int, ...]
    path: Path
    position: int
    """Byte of the file where it begins."""


@dataclass(frozen=True)
class StoredTensor:
    """One logical tensor. Its chunks cover it exactly once; `check_cover` proves it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[StoredChunk, ...]
    scales: BlockScales | None = None
    """What its elements are multiplied by to become values; None where they are the values."""

    @property
    def value_dtype(self) -> torch.dtype:
        """The type of its values."""
        return self.dtype if self.scales is None else self.scales.dtype

    @property
    def num_rows(self) -> int:
        """Length of the first dimension; 1 for a scalar."""
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def paths(self) -> set[Path]:
        return {chunk.path for chunk in self.chunks}

    def with_fused_rows(self) -> StoredTensor:
        """`[parts, rows, ...]` as `[parts * rows, ...]`: the same bytes, fused parts below each other."""
        rows = self.shape[1]
        item = self.dtype.itemsize
        chunks = []
        for chunk in self.chunks:
            step = math.prod(chunk.sizes[1:]) * item
            for index in range(chunk.sizes[0]):
                offsets = ((chunk.offsets[0] + index) * rows + chunk.offsets[1], *chunk.offsets[2:])
                chunks.append(StoredChunk(offsets, chunk.sizes[1:], chunk.path, chunk.position + index * step))
        return StoredTensor(self.name, self.dtype, (self.shape[0] * rows, *self.shape[2:]), tuple(chunks))

    def with_short_rows(self, limit: int = BLOCK_BYTES) -> StoredTensor:
        """The same bytes in rows of at most `limit` bytes where the shape allows it, so that blocks stay small."""
        tensor = self
        while len(tensor.shape) > 1 and tensor.row_bytes > limit and tensor.scales is None:
            tensor = tensor.with_fused_rows()
        return tensor

    def check_cover(self) -> None:
        """Raise ValueError when chunks overlap, leave a gap or lie outside."""
        total = 0
        for chunk in self.chunks:
            inside = len(chunk.offsets) == len(chunk.sizes) == len(self.shape) and all(
                0 <= start and start + size <= length
                for start, size, length in zip(chunk.offsets, chunk.sizes, self.shape, strict=True)
            )
            if not inside:
                raise ValueError(
                    f"{self.name}: the part of {chunk.path.name} at {chunk.offsets} of size {chunk.sizes} does not lie "
                    f"in the shape {self.shape}"
                )
            total += math.prod(chunk.sizes)
        if total != math.prod(self.shape) or _any_overlap(self.chunks):
            raise ValueError(f"{self.name}: its {len(self.chunks)} parts do not cover the shape {self.shape} once")


@dataclass(frozen=True)
class BlockScales:
    """Factors of a quantised matrix, one for each block; the blocks at its lower and right edge may be cut off."""

    tensor: StoredTensor
    """`[blocks below each other, blocks beside each other]`"""
    block: tuple[int, int]
    """Rows and columns of a block."""
    dtype: torch.dtype
    """The type that the products, taken in fp32, are rounded to when no other is asked for."""


def _any_overlap(chunks: Sequence[StoredChunk]) -> bool:
    ordered = sorted(chunks, key=lambda chunk: chunk.offsets)
    for number, one in enumerate(ordered):
        for other in ordered[number + 1 :]:
            if other.offsets and other.offsets[0] >= one.offsets[0] + one.sizes[0]:
                break
            if all(
                a < b + size_b and b < a + size_a
                for a, size_a, b, size_b in zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
            ):
                return True
    return False


@dataclass
class FilePool:
    """Open files by path, shared by the threads of a conversion; reads are at positions and need no lock."""

    descriptors: dict[Path, int] = field(default_factory=dict)
    lock: Lock = field(default_factory=Lock)

    def descriptor(self, path: Path) -> int:
        with self.lock:
            if path not in self.descriptors:
                self.descriptors[path] = os.open(path, os.O_RDONLY)
            return self.descriptors[path]

    def close(self) -> None:
        with self.lock:
            for descriptor in self.descriptors.values():
                os.close(descriptor)
            self.descriptors.clear()

    def read_into(self, path: Path, position: int, out: memoryview) -> None:
        """Fill `out` from a position of a file.

        Raises:
            DamagedFile: the file ends before.
        """
        descriptor, done = self.descriptor(path), 0
        while done < len(out):
            got = os.preadv(descriptor, [out[done:]], position + done)
            if not got:
                size = os.fstat(descriptor).st_size
                raise DamagedFile(
                    f"{path} ends at byte {size}, its own table of contents goes to byte {position + len(out)} at least"
                )
            done += got

    def read_rows(self, tensor: StoredTensor, start: int, count: int, out: memoryview) -> None:
        """Fill `out` with rows `start` to `start + count` of a tensor, as its raw bytes."""
        shape = (count, *tensor.shape[1:])
        width = tensor.row_bytes
        for chunk in tensor.chunks:
            first = chunk.offsets[0] if chunk.offsets else 0
            rows = chunk.sizes[0] if chunk.sizes else 1
            low, high = max(start, first), min(start + count, first + rows)
            if low >= high:
                continue
            if chunk.sizes[1:] == tensor.shape[1:]:
                part = out[(low - start) * width : (high - start) * width]
                self.read_into(chunk.path, chunk.position + (low - first) * width, part)
                continue
            kind = INTEGERS[tensor.dtype.itemsize]
            narrow: np.ndarray = np.empty((high - low, *chunk.sizes[1:]), kind)
            skip = (low - first) * math.prod(chunk.sizes[1:]) * tensor.dtype.itemsize
            self.read_into(chunk.path, chunk.position + skip, narrow.data.cast("B"))
            inner = (
                slice(offset, offset + size) for offset, size in zip(chunk.offsets[1:], chunk.sizes[1:], strict=True)
            )
            place = (slice(low - start, high - start), *inner)
            np.frombuffer(out, kind).reshape(shape)[place] = narrow

    def read(self, tensor: StoredTensor) -> torch.Tensor:
        """The whole tensor in memory."""
        value = torch.empty(tensor.shape, dtype=tensor.dtype)
        if value.numel():
            self.read_rows(tensor, 0, tensor.num_rows, as_bytes(value).data)
        return value


@contextmanager
def open_files() -> Iterator[FilePool]:
    """A pool whose files are closed at the end."""
    pool = FilePool()
    try:
        yield pool
    finally:
        pool.close()


def as_bytes(tensor: torch.Tensor) -> np.ndarray:
    """The bytes of a contiguous CPU tensor, shared with it."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def row_blocks(num_rows: int, row_bytes: int, limit: int = BLOCK_BYTES) -> Iterator[tuple[int, int]]:
    """`(start, count)` of blocks of whole rows of at most `limit` bytes, at least one row each."""
    step = max(1, limit // max(row_bytes, 1))
    for start in range(0, num_rows, step):
        yield start, min(step, num_rows - start)
