"""Copies tensors from the files that hold them into new ones, block by block, checking what passes by."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, local
from typing import Protocol

import numpy as np
import torch

from megatron_rb.checkpoint.storage.block_scales import ROW_BYTES_LIMIT, scaled_rows
from megatron_rb.checkpoint.storage.checksum import Checksum, count_not_finite
from megatron_rb.checkpoint.storage.tensors import (
    BLOCK_BYTES,
    DamagedFile,
    FilePool,
    StoredTensor,
    as_bytes,
    row_blocks,
)

MANIFEST = "manifest.json"
"""What a conversion says of itself, beside the tensors it wrote."""


class Stopped(Exception):
    """The user or another thread's failure ended the conversion."""


class Progress(Protocol):
    """Told how far a conversion is, from any thread."""

    def total(self, doing: str, num_bytes: int) -> None: ...

    def advance(self, doing: str, num_bytes: int) -> None: ...


class Silent:
    """No progress shown."""

    def total(self, doing: str, num_bytes: int) -> None: ...

    def advance(self, doing: str, num_bytes: int) -> None: ...


@dataclass
class Job:
    """What the threads of a conversion share."""

    pool: FilePool
    progress: Progress = field(default_factory=Silent)
    stop: Event = field(default_factory=Event)
    known: Mapping[str, str] = field(default_factory=dict)
    """Checksums that the source's own manifest gives for its tensors, by name."""

    _buffers: local = field(default_factory=local, repr=False)
    _source_checksums: dict[StoredTensor, str] = field(default_factory=dict, repr=False)

    def buffer(self, num_bytes: int) -> memoryview:
        """This thread's block of memory: valid until it asks again. Fresh memory for each block would cost as much as
        copying into it.
        """
        held = getattr(self._buffers, "held", None)
        if held is None or len(held) < num_bytes:
            held = self._buffers.held = np.empty(max(num_bytes, BLOCK_BYTES), np.uint8).data
        return held[:num_bytes]

    def source_checksum(self, tensor: StoredTensor) -> str:
        """Checksum of a source, read once whatever the number of targets that are made of parts of it."""
        if tensor not in self._source_checksums:
            self._source_checksums[tensor] = tensor_checksum(tensor, self)
        return self._source_checksums[tensor]

    def check_source(self, tensor: StoredTensor, found: str) -> None:
        """Raise DamagedFile when a tensor is not what the source's manifest says."""
        if self.known.get(tensor.name, found) != found:
            files = ", ".join(sorted(path.name for path in tensor.paths))
            raise DamagedFile(
                f"{tensor.name} in {files} is not what the {MANIFEST} beside it says ({found} instead of "
                f"{self.known[tensor.name]}): the file has changed since it was written; fetch it again"
            )

    def advance(self, doing: str, num_bytes: int) -> None:
        if self.stop.is_set():
            raise Stopped
        self.progress.advance(doing, num_bytes)


@dataclass(frozen=True)
class TensorRows:
    """Rows of a stored tensor."""

    tensor: StoredTensor
    start: int
    count: int

    @property
    def is_whole(self) -> bool:
        return self.start == 0 and self.count == self.tensor.num_rows

    @classmethod
    def whole(cls, tensor: StoredTensor) -> TensorRows:
        """All of a tensor, in rows that fit into a block."""
        short = tensor.with_short_rows()
        return cls(short, 0, short.num_rows)


@dataclass(frozen=True)
class Target:
    """A tensor to be written: pieces of others below each other."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[TensorRows, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __post_init__(self) -> None:
        elements = sum(piece.count * (piece.tensor.row_bytes // piece.tensor.dtype.itemsize) for piece in self.pieces)
        if elements != math.prod(self.shape):
            raise ValueError(f"{self.name}: {elements} elements cannot make up the shape {self.shape}")


@dataclass
class CastReport:
    """What a change of type did."""

    elements: int = 0
    changed: int = 0
    """Elements whose value is not the same any more."""
    max_abs_error: float = 0.0

    def add(self, before: torch.Tensor, after: torch.Tensor) -> None:
        wide = torch.promote_types(before.dtype, after.dtype)
        difference = (after.to(wide) - before.to(wide)).abs()
        self.elements += before.numel()
        self.changed += int((difference != 0).sum())  # NaNs count as changed: their payload may be another
        finite = difference[difference.isfinite()]
        self.max_abs_error = max(self.max_abs_error, float(finite.max()) if finite.numel() else 0.0)


@dataclass
class Copied:
    """The record of one written tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    checksum: str
    nans: int
    infinities: int
    sources: dict[str, str]
    """Checksum of every stored tensor it was made of, by name."""
    cast: CastReport | None

    def as_json(self) -> dict:
        record: dict = {
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": list(self.shape),
            "checksum": self.checksum,
            "sources": self.sources,
        }
        record |= {"nans": self.nans} if self.nans else {}
        record |= {"infinities": self.infinities} if self.infinities else {}
        if self.cast is not None:
            record["cast"] = vars(self.cast)
        return record


class TensorCopy:
    """One pass over the blocks of a target; `record` is complete after the last block."""

    def __init__(self, target: Target, job: Job) -> None:
        self.target = target
        self.job = job
        self.checksum = Checksum()
        self.nans = self.infinities = 0
        self.sources: dict[str, str] = {}
        casts = any(p.tensor.scales is None and p.tensor.dtype != target.dtype for p in target.pieces)
        self.cast = CastReport() if casts else None

    def blocks(self, doing: str) -> Iterator[memoryview]:
        """The bytes of the target in order; each block is valid until the next is asked for."""
        for piece in self.target.pieces:
            own = Checksum() if piece.is_whole else None
            for block in self._piece_blocks(piece, own):
                self.checksum.update(block)
                nans, infinities = count_not_finite(block, self.target.dtype)
                self.nans, self.infinities = self.nans + nans, self.infinities + infinities
                yield block
                self.job.advance(doing, len(block))
            if own is not None:
                self.sources[piece.tensor.name] = own.hexdigest()

    def _piece_blocks(self, piece: TensorRows, own: Checksum | None) -> Iterator[memoryview]:
        tensor = piece.tensor
        limit = BLOCK_BYTES if tensor.scales is None else ROW_BYTES_LIMIT
        for start, count in row_blocks(piece.count, tensor.row_bytes, limit):
            block = self.job.buffer(count * tensor.row_bytes)
            self.job.pool.read_rows(tensor, piece.start + start, count, block)
            if own is not None:
                own.update(block)
            if tensor.scales is not None:
                yield self._scaled(tensor, piece.start + start, block)
            else:
                yield block if tensor.dtype == self.target.dtype else self._converted(block, tensor.dtype)

    def _scaled(self, tensor: StoredTensor, first: int, block: memoryview) -> memoryview:
        rows = torch.frombuffer(block, dtype=tensor.dtype).view(-1, *tensor.shape[1:])
        return as_bytes(scaled_rows(self.job.pool, tensor, first, rows).to(self.target.dtype)).data

    def _converted(self, block: memoryview, dtype: torch.dtype) -> memoryview:
        before = torch.frombuffer(block, dtype=dtype)
        after = before.to(self.target.dtype)
        assert self.cast is not None
        self.cast.add(before, after)
        return as_bytes(after).data

    def record(self) -> Copied:
        """Reads those sources again that were not read from their first row to their last."""
        for tensor in sources_of(self.target):
            if tensor.name not in self.sources:
                self.sources[tensor.name] = self.job.source_checksum(tensor)
            self.job.check_source(tensor, self.sources[tensor.name])
        target = self.target
        return Copied(
            target.name,
            target.dtype,
            target.shape,
            self.checksum.hexdigest(),
            self.nans,
            self.infinities,
            self.sources,
            self.cast,
        )


def tensor_checksum(tensor: StoredTensor, job: Job, doing: str = "") -> str:
    """Checksum of the bytes of a stored tensor, in row-major order."""
    result = Checksum()
    tensor = tensor.with_short_rows()
    for start, count in row_blocks(tensor.num_rows, tensor.row_bytes):
        block = job.buffer(count * tensor.row_bytes)
        job.pool.read_rows(tensor, start, count, block)
        result.update(block)
        if doing:
            job.advance(doing, len(block))
    return result.hexdigest()


def plan_files(targets: list[Target], max_bytes: int) -> list[list[Target]]:
    """Targets of each file, in order: as few files as `max_bytes` allows, of about one size, since they are written at
    the same time and the largest is waited for. A target alone may exceed the limit.
    """
    total = sum(target.num_bytes for target in targets)
    share = total / max(1, math.ceil(total / max_bytes))
    files: list[list[Target]] = []
    filled = 0
    for target in targets:
        middle = filled + target.num_bytes / 2
        if not files or middle > share or filled + target.num_bytes > max_bytes:
            files.append([])
            filled = 0
        files[-1].append(target)
        filled += target.num_bytes
    return files


def sources_of(target: Target) -> list[StoredTensor]:
    """The tensors that a target is made of, block scales too, each once."""
    found: dict[str, StoredTensor] = {}
    for piece in target.pieces:
        found[piece.tensor.name] = piece.tensor
        if piece.tensor.scales is not None:
            found[piece.tensor.scales.tensor.name] = piece.tensor.scales.tensor
    return list(found.values())


def paths_of(targets: list[Target]) -> set[Path]:
    """All files that targets are read from."""
    return {path for target in targets for tensor in sources_of(target) for path in tensor.paths}
