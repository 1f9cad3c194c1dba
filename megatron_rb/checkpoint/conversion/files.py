"""Writes one file of tensors as a stream: safetensors, or the blobs of a `torch_dist` folder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_rb.checkpoint.conversion.stream import Job, Target, TensorCopy
from megatron_rb.checkpoint.storage.safetensors_files import safetensors_header
from megatron_rb.checkpoint.storage.torch_blob import blob_frame
from megatron_rb.checkpoint.storage.torch_dist import Blob, WrittenChunk, chunk_rows

WRITING = "writing"
CHUNK_BYTES = 128 << 20
"""A reader fetches whole chunks, also for a few rows: large enough for a disk, small enough for tensor parallelism."""

FileRecord = dict[str, Any]


def write_safetensors(path: Path, targets: Sequence[Target], job: Job) -> FileRecord:
    """Write the file and return the record of its tensors."""
    tensors = {}
    with open(path, "wb", buffering=0) as file:
        _write(file, memoryview(safetensors_header((t.name, t.dtype, t.shape) for t in targets)))
        for target in targets:
            copy = TensorCopy(target, job)
            for block in copy.blocks(WRITING):
                _write(file, block)
            tensors[target.name] = copy.record().as_json()
    return {"tensors": tensors}


def write_dist_file(path: Path, targets: Sequence[Target], job: Job) -> FileRecord:
    """Write the blobs of whole tensors, each cut into chunks; the record also tells where the chunks lie."""
    tensors = {}
    with open(path, "wb", buffering=0) as file:
        for target in targets:
            copy = TensorCopy(target, job)
            chunks = _write_chunks(file, target, copy)
            tensors[target.name] = copy.record().as_json() | {"chunks": chunks}
    return {"tensors": tensors}


def _write_chunks(file, target: Target, copy: TensorCopy) -> list[list]:
    planned = chunk_rows(target.shape, target.dtype, CHUNK_BYTES)
    chunks = []
    blocks = copy.blocks(WRITING)
    rest = memoryview(b"")
    for offsets, sizes in planned:
        before, behind = blob_frame(target.dtype, sizes)
        start = file.tell()
        _write(file, memoryview(before))
        missing = math.prod(sizes) * target.dtype.itemsize
        while missing:
            rest = rest or next(blocks)
            part, rest = rest[:missing], rest[missing:]
            _write(file, part)
            missing -= len(part)
        _write(file, memoryview(behind))
        chunks.append([list(offsets), list(sizes), start, file.tell() - start])
    for _ in blocks:
        raise AssertionError(f"{target.name} has more bytes than its shape {target.shape}")
    return chunks


def written_chunks(records: dict[str, FileRecord]) -> list[WrittenChunk]:
    """The chunks that the records of `write_dist_file` tell of."""
    return [
        WrittenChunk(name, tuple(offsets), tuple(sizes), Blob(file, position, length))
        for file, record in records.items()
        for name, tensor in record["tensors"].items()
        for offsets, sizes, position, length in tensor["chunks"]
    ]


def _write(file, block: memoryview) -> None:
    done = 0
    while done < len(block):
        done += file.write(block[done:])
