"""Reads boxes of the tensors of a `torch_dist` folder into memory: the bytes that they span, and no others."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from megatron.core.dist_checkpointing import ShardedTensor, load_common_state_dict
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from megatron_rb.checkpoint.storage.mosaic import cropped
from megatron_rb.checkpoint.storage.restricted import read_torch_file
from megatron_rb.checkpoint.storage.tensors import DamagedFile, FilePool, StoredTensor, as_bytes, open_files
from megatron_rb.parallel.boxes import TensorBox, place_of, strides_of


@dataclass(frozen=True)
class Stored:
    """Table of contents of a folder, and what all ranks share."""

    folder: Path
    metadata: Metadata
    common: dict[str, Any]

    @cached_property
    def keys(self) -> frozenset[str]:
        """Of tensors and objects."""
        return frozenset(self.metadata.state_dict_metadata)

    def shape(self, key: str) -> tuple[int, ...]:
        """Of a tensor."""
        return tuple(self.tensor(key).size)

    def tensor(self, key: str) -> TensorStorageMetadata:
        """Description of a tensor."""
        return cast(TensorStorageMetadata, self.metadata.state_dict_metadata[key])

    def object(self, key: str) -> Any:
        """What megatron-core has pickled under a key."""
        info = self.metadata.storage_data[MetadataIndex(key)]
        with open(self.folder / info.relative_path, "rb") as file:
            file.seek(info.offset)
            blob = io.BytesIO(file.read(info.length))
        return torch.load(blob, weights_only=False)[0]


def open_stored(folder: Path) -> Stored:
    """Read the table of contents.

    Raises:
        ValueError: it is no distributed checkpoint.
    """
    try:
        common = load_common_state_dict(str(folder))
    except CheckpointingException as error:
        raise ValueError(f"{folder} does not fit this run: {error}") from error
    return Stored(folder, FileSystemReader(folder).read_metadata(), common)


def read_pieces(stored: Stored, pieces: Iterable[ShardedTensor]) -> None:
    """Fill the data of boxes of stored tensors.

    Raises:
        DamagedFile: a file is cut off, or the folder does not hold all of a box.
    """
    blobs: dict[MetadataIndex, StoredTensor] = {}
    with open_files() as pool:
        for piece in pieces:
            _read_piece(stored, piece, pool, blobs)


def _read_piece(stored: Stored, piece: ShardedTensor, pool: FilePool, blobs: dict[MetadataIndex, StoredTensor]) -> None:
    wanted, found = TensorBox(piece.global_offset, piece.local_shape), 0
    for described in stored.tensor(piece.key).chunks:
        chunk = TensorBox(tuple(described.offsets), tuple(described.sizes))
        inside = wanted.overlap(chunk)
        if inside is None:
            continue
        index = MetadataIndex(piece.key, described.offsets)
        if index not in blobs:
            blobs[index] = find_blob(stored, index, chunk.shape)
        values = read_box(pool, blobs[index], inside.seen_from(chunk.start))
        piece.data[inside.seen_from(wanted.start).slices()].copy_(values)
        found += inside.numel
    if found != wanted.numel:
        raise DamagedFile(f"{stored.folder} is damaged: it holds {found} of {wanted.numel} elements of {piece.key}")


def find_blob(stored: Stored, index: MetadataIndex, shape: tuple[int, ...]) -> StoredTensor:
    """Where the bytes of a stored part of a tensor lie."""
    info = stored.metadata.storage_data[index]
    path = stored.folder / info.relative_path
    tree = read_torch_file(path, info.offset, info.length).tree
    if not isinstance(tree, StoredTensor) or tree.shape != shape:
        raise DamagedFile(f"{path} is damaged: at byte {info.offset} it does not hold {index.fqn} as .metadata says")
    return tree


def read_box(pool: FilePool, blob: StoredTensor, box: TensorBox) -> torch.Tensor:
    """A box of a blob by one read from its first to its last element: a box of whole rows has no others between."""
    if len(blob.chunks) != 1:
        return pool.read(cropped(blob, box.start, box.shape))
    first = place_of(box.start, blob.shape)
    last = place_of([low + size - 1 for low, size in zip(box.start, box.shape, strict=True)], blob.shape)
    span = torch.empty(last - first + 1, dtype=blob.dtype)
    chunk = blob.chunks[0]
    pool.read_into(chunk.path, chunk.position + first * blob.dtype.itemsize, as_bytes(span).data)
    return span.as_strided(box.shape, strides_of(blob.shape))
