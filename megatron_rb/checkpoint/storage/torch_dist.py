"""Folders of torch.distributed.checkpoint (megatron-core's `torch_dist`): where their tensors lie, and writing them.

`.metadata` says in which file, where and how long the blob of every chunk is; a blob is what torch.save writes.
Nothing is imported because a file names it, and neither a device nor a process group is needed.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_rb.checkpoint.storage.class_pickle import CallResult, Global, Instance, dumps
from megatron_rb.checkpoint.storage.restricted import TorchFile, read_torch_file, restricted_loads
from megatron_rb.checkpoint.storage.tensors import DamagedFile, StoredChunk, StoredTensor

CHECKPOINT = "torch.distributed.checkpoint"
METADATA, COMMON, BACKEND = ".metadata", "common.pt", "metadata.json"
COMMON_KEY = "common_state"
"""Key of the object in which megatron-core keeps the content of `common.pt` from 0.19 on."""
COMMON_OBJECT = f"{COMMON_KEY}/shard_0_1"
BACKEND_CONTENT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True)
class Blob:
    """A piece of a file."""

    file: str
    position: int
    length: int


@dataclass(frozen=True)
class DistFolder:
    """A folder's table of contents."""

    folder: Path
    tensors: dict[str, StoredTensor]
    objects: dict[str, Blob]
    """Pickled objects by name, e.g. `rng/shard_0_2`; without that of `read_common`."""
    blobs: tuple[TorchFile, ...]
    """The tensors' blobs; each knows the checksums that were written with it."""
    common: Blob | None = None
    """Where what all ranks share is, if it is no file of its own."""

    def blobs_of(self, names: Iterable[str]) -> list[TorchFile]:
        """The blobs of some of the tensors."""
        wanted = {(chunk.path, chunk.position) for name in names for chunk in self.tensors[name].chunks}
        return [b for b in self.blobs if any((b.path, record.position) in wanted for record in b.records)]

    def read_common(self) -> Any:
        """What all ranks share: the scalars of `common.pt`, or of the object that newer releases keep in its place.

        Raises:
            DamagedFile: there is neither.
            UnsafePickle: it names something that is neither harmless nor known.
        """
        if (self.folder / COMMON).is_file():
            return read_torch_file(self.folder / COMMON).tree
        if self.common is None:
            raise DamagedFile(f"{self.folder} is damaged: it has neither {COMMON} nor {COMMON_KEY} in {METADATA}")
        blob = read_torch_file(self.folder / self.common.file, self.common.position, self.common.length)
        return blob.tree[0]

    @property
    def has_common(self) -> bool:
        return self.common is not None or (self.folder / COMMON).is_file()


def read_dist_folder(folder: Path, is_wanted: Callable[[str], bool] = lambda name: True) -> DistFolder:
    """Find every tensor and object of a folder; reads descriptions only.

    Args:
        is_wanted: which tensors are looked for, by name; others are passed over.

    Raises:
        DamagedFile: files are missing or cut off, or a blob is not what the metadata says.
        UnsafePickle: the metadata names something that a checkpoint does not need.
    """
    path = folder / METADATA
    if not path.is_file():
        raise DamagedFile(f"{folder} is damaged: it has no {METADATA}")
    metadata = restricted_loads(path.read_bytes(), str(path))
    blobs = {(index.fqn, _tuple(index.state.get("offset"))): info for index, info in metadata.storage_data.items()}
    absent = sorted({i.relative_path for i in blobs.values() if not (folder / i.relative_path).is_file()})
    if absent:
        raise DamagedFile(f"{folder} is damaged: {len(absent)} of its files are missing, e.g. {absent[0]}")
    tensors, objects = {}, {}
    files: list[TorchFile] = []
    for name, entry in metadata.state_dict_metadata.items():
        if entry.type_name.endswith(".BytesStorageMetadata"):
            info = blobs[name, None]
            objects[name] = Blob(info.relative_path, info.offset, info.length)
        elif is_wanted(name):
            tensors[name] = _tensor(folder, name, entry, blobs, files)
    common = objects.pop(COMMON_OBJECT, None)
    return DistFolder(folder, tensors, objects, tuple(files), common)


def _tuple(value: Any) -> tuple[int, ...] | None:
    return None if value is None else tuple(value)


def _tensor(folder: Path, name: str, entry: Any, blobs: Mapping, files: list[TorchFile]) -> StoredTensor:
    # TensorProperties are pickled as a tuple that begins with the type.
    dtype, shape = entry.properties.state[0], tuple(entry.size)
    chunks = []
    for described in entry.chunks:
        offsets, sizes = tuple(described.offsets), tuple(described.sizes)
        info = blobs.get((name, offsets))
        if info is None:
            raise DamagedFile(f"{folder} is damaged: no file holds the part of {name} at {offsets}")
        path = folder / info.relative_path
        files.append(read_torch_file(path, info.offset, info.length))
        found = files[-1].tree
        if not isinstance(found, StoredTensor) or (found.dtype, found.shape) != (dtype, sizes):
            raise DamagedFile(f"{path} is damaged: at byte {info.offset} it does not hold {name} as {METADATA} says")
        chunks += [
            StoredChunk(
                tuple(a + b for a, b in zip(offsets, part.offsets, strict=True)), part.sizes, path, part.position
            )
            for part in found.chunks
        ]
    tensor = StoredTensor(name, dtype, shape, tuple(chunks))
    tensor.check_cover()
    return tensor


@dataclass(frozen=True)
class WrittenChunk:
    """A chunk of a tensor and the blob that holds it."""

    name: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    blob: Blob


def write_dist_metadata(
    folder: Path,
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    chunks: Iterable[WrittenChunk],
    objects: Mapping[str, Blob],
    common: Any,
) -> None:
    """Write the three small files that make a folder with the blobs a checkpoint."""
    parts: dict[str, list[Instance]] = {name: [] for name in tensors}
    storage: dict[Instance, Instance] = {}
    for chunk in chunks:
        offsets = _size(chunk.offsets)
        parts[chunk.name].append(_metadata("ChunkStorageMetadata", offsets=offsets, sizes=_size(chunk.sizes)))
        storage[_index(chunk.name, offsets)] = _info(chunk.blob)
    entries = {
        name: _metadata("TensorStorageMetadata", properties=_properties(dtype), size=_size(shape), chunks=parts[name])
        for name, (dtype, shape) in tensors.items()
    }
    for name, blob in objects.items():
        entries[name] = Instance(Global(f"{CHECKPOINT}.metadata", "BytesStorageMetadata"), None)
        storage[_index(name, None)] = _info(blob)
    metadata = _metadata(
        "Metadata", state_dict_metadata=entries, planner_data=None, storage_data=storage, storage_meta=None
    )
    (folder / METADATA).write_bytes(dumps(metadata))
    (folder / BACKEND).write_text(json.dumps(BACKEND_CONTENT))
    buffer = io.BytesIO()
    torch.save(common, buffer)
    (folder / COMMON).write_bytes(buffer.getvalue())


def _metadata(name: str, **state: Any) -> Instance:
    return Instance(Global(f"{CHECKPOINT}.metadata", name), state)


def _index(name: str, offset: CallResult | None) -> Instance:
    return _metadata("MetadataIndex", fqn=name, offset=offset, index=None)


def _size(sizes: tuple[int, ...]) -> CallResult:
    return CallResult(Global("torch", "Size"), (tuple(sizes),))


def _properties(dtype: torch.dtype) -> Instance:
    layout = CallResult(Global("torch.serialization", "_get_layout"), ("torch.strided",))
    contiguous = CallResult(Global(f"{CHECKPOINT}.metadata", "_MEM_FORMAT_ENCODING"), (0,))
    name = str(dtype).removeprefix("torch.")
    return Instance(
        Global(f"{CHECKPOINT}.metadata", "TensorProperties"), (Global("torch", name), layout, False, contiguous, False)
    )


def _info(blob: Blob) -> Instance:
    state = {"relative_path": blob.file, "offset": blob.position, "length": blob.length}
    return Instance(Global(f"{CHECKPOINT}.filesystem", "_StorageInfo"), state)


def chunk_rows(shape: tuple[int, ...], dtype: torch.dtype, limit: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Offsets and sizes of consecutive blocks of a tensor of at most `limit` bytes each, along its first dimension.

    A leading dimension of few, large rows (fused parts) is cut along the second one as well.
    """
    if not shape or math.prod(shape) == 0:
        return [((0,) * len(shape), shape)]
    row = math.prod(shape[1:]) * dtype.itemsize
    if row > limit and len(shape) > 1:
        inner = chunk_rows(shape[1:], dtype, limit)
        return [((index, *offsets), (1, *sizes)) for index in range(shape[0]) for offsets, sizes in inner]
    step = max(1, limit // row)
    tail = shape[1:]
    return [((start, *[0] * len(tail)), (min(step, shape[0] - start), *tail)) for start in range(0, shape[0], step)]
