"""Reads pickles and `torch.save` files without running anything they name: an allow-list of harmless things."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_rb.checkpoint.storage.stand_ins import (
    HARMLESS,
    Constructor,
    Opaque,
    StoredStorage,
    Tag,
    UnsafePickle,
    opaque_class,
)
from megatron_rb.checkpoint.storage.tensors import BLOCK_BYTES, DamagedFile

__all__ = ["Opaque", "Record", "TorchFile", "UnsafePickle", "damaged_records", "read_torch_file", "restricted_loads"]

STAND_IN_MODULES = (
    "megatron",
    "megatron_patch",
    "flagscale",
    "transformer_engine",
    "transformer_engine_torch",
    "transformer_engine_musa",
    "torch_musa",
    "musa_patch",
    "apex",
    "nvidia_resiliency_ext",
    "modelopt",
    "omegaconf",
    "torch.distributed",
    "torch.torch_version",
    "datetime",
)
"""Modules whose classes become `Opaque` stand-ins; those below them too."""
STAND_IN_CLASSES = (
    "argparse.Namespace",
    "types.SimpleNamespace",
    "signal.Signals",
    "uuid.UUID",
    "torch.device",
    "torch.Generator",
    "torch._C.Generator",
    "torch.storage._load_from_bytes",
)
"""Single classes (and the loader of a storage inside a plain pickle, which is left undecoded) treated alike."""
_OLD_NAMES = {
    # Protocols below 3 use the names of Python 2.
    "copy_reg._reconstructor": "copyreg._reconstructor",
    "builtins.xrange": "builtins.range",
    "builtins.unicode": "builtins.str",
    "builtins.long": "builtins.int",
}
_LOCAL_HEADER = 30
"""Bytes of a zip record's header before its name."""


def restricted_loads(data: bytes, where: str, tensors: Callable[[Any], Any] | None = None) -> Any:
    """The object tree of a pickle; classes outside the allow-list are `Opaque` or refused, and nothing is imported.

    Args:
        data: the pickle.
        where: the file's name for errors.
        tensors: what stands for each persistent id; without it a pickle that has some is refused.

    Raises:
        UnsafePickle: it names something that is neither harmless nor known.
        DamagedFile: it is cut off or is no pickle.
    """
    return _load(data, where, tensors)[0]


@dataclass(frozen=True)
class Record:
    """One record of a torch file's zip container."""

    name: str
    position: int
    """Byte of the file where its content begins."""
    size: int
    crc32: int


@dataclass(frozen=True)
class TorchFile:
    """The content of a `torch.save` file, or of one inside a larger file."""

    path: Path
    tree: Any
    """The saved object. Every tensor is a `StoredTensor` without a name, its chunks at absolute places of the file."""
    device_tags: frozenset[str]
    """Devices that its tensors and `torch.device` objects name, such as `cuda:3` or `musa:0`."""
    records: tuple[Record, ...]


def read_torch_file(path: Path, position: int = 0, length: int | None = None) -> TorchFile:
    """Read the structure of a `torch.save` file; tensors stay in the file.

    Args:
        path: the file.
        position: byte where the `torch.save` content begins.
        length: its bytes; None = to the end of the file.

    Raises:
        UnsafePickle: it names something that is neither harmless nor known.
        DamagedFile: it is cut off, has wrong checksums, or is not a torch file of the zip format.
    """
    size = path.stat().st_size
    if position + (length or 0) > size:
        raise DamagedFile(f"{path} ends at byte {size}, its content should go to byte {position + (length or 0)}")
    with open(path, "rb") as file:
        window = _Window(file, position, size - position if length is None else length)
        records, pickled = _open_container(path, window)
    prefix = next(name for name in records if name.endswith("/data.pkl")).removesuffix("data.pkl")
    tree, tags = _load(pickled, str(path), _storage_finder(path, prefix, records))
    return TorchFile(path, tree, frozenset(tags), tuple(records.values()))


def damaged_records(file: TorchFile) -> Iterator[str]:
    """Names of the records whose bytes do not have the checksum of the container; reads the whole content.

    A checksum of 0 was not computed by the writer and is not compared.
    """
    with open(file.path, "rb") as handle:
        for record in file.records:
            if not record.crc32:
                continue
            handle.seek(record.position)
            left, crc = record.size, 0
            while left and (block := handle.read(min(left, BLOCK_BYTES))):
                crc = zlib.crc32(block, crc)
                left -= len(block)
            if left or crc != record.crc32:
                yield record.name


@dataclass
class _Window(io.RawIOBase):
    """A part of a file, as zipfile needs it."""

    file: io.BufferedReader
    start: int
    length: int
    here: int = field(default=0)

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.here

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.here, io.SEEK_END: self.length}[whence]
        if base + offset < 0:
            raise OSError(f"position {base + offset} lies before the beginning")
        self.here = base + offset
        return self.here

    def read(self, count: int = -1, /) -> bytes:
        left = max(0, self.length - self.here)
        self.file.seek(self.start + self.here)
        data = self.file.read(left if count is None or count < 0 else min(count, left))
        self.here += len(data)
        return data


def _open_container(path: Path, window: _Window) -> tuple[dict[str, Record], bytes]:
    """The records of a torch file by name, and its pickle."""
    start = window.read(4)
    try:
        with zipfile.ZipFile(window) as archive:
            records = _records(path, archive, window)
            pickles = [name for name in records if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise DamagedFile(f"{path} is a zip file without a data.pkl: it was not written by torch.save")
            _check_byte_order(path, archive, pickles[0])
            return records, archive.read(pickles[0])
    except (zipfile.BadZipFile, EOFError, NotImplementedError, OSError) as error:
        raise _not_a_container(path, window, start, error) from error


def _not_a_container(path: Path, window: _Window, start: bytes, error: Exception) -> DamagedFile:
    if start.startswith(b"PK"):
        return DamagedFile(
            f"{path} is cut off or damaged: it begins as a torch file at byte {window.start}, but {error}; "
            "copy it again"
        )
    if start[:1] == b"\x80":
        return DamagedFile(
            f"{path} is a plain pickle or of the torch format before 1.6, which is not read; open it with the torch "
            "that wrote it and save it again"
        )
    return DamagedFile(f"{path} is not a torch.save file: it begins with {start!r} at byte {window.start}")


def _check_byte_order(path: Path, archive: zipfile.ZipFile, pickled: str) -> None:
    name = pickled.removesuffix("data.pkl") + "byteorder"
    order = archive.read(name) if name in archive.namelist() else b"little"
    if order != b"little":
        raise DamagedFile(
            f"{path} was written in byte order {order.decode(errors='replace')!r}, only 'little' is read; save it "
            "again on a little-endian machine"
        )


def _records(path: Path, archive: zipfile.ZipFile, window: _Window) -> dict[str, Record]:
    records: dict[str, Record] = {}
    for info in archive.infolist():
        if info.filename in records:
            raise DamagedFile(f"{path} holds two records {info.filename}")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise DamagedFile(f"{path}: the record {info.filename} is compressed or encrypted, which torch never does")
        window.seek(info.header_offset)
        header = window.read(_LOCAL_HEADER)
        if len(header) < _LOCAL_HEADER or not header.startswith(b"PK\x03\x04"):
            raise DamagedFile(f"{path} is cut off or damaged at its record {info.filename}; copy it again")
        name_length, extra_length = struct.unpack("<HH", header[26:])
        begin = info.header_offset + _LOCAL_HEADER + name_length + extra_length
        if begin + info.file_size > window.length:
            raise DamagedFile(f"{path} ends within its record {info.filename}; copy it again")
        records[info.filename] = Record(info.filename, window.start + begin, info.file_size, info.CRC)
    return records


def _storage_finder(path: Path, prefix: str, records: dict[str, Record]) -> Callable[[Any], StoredStorage]:
    def find(persistent_id: Any) -> StoredStorage:
        match persistent_id:
            case ("storage", Tag(value=dtype), str(key), str(), int(count)):
                pass
            case _:
                raise UnsafePickle(f"{path} refers to something else than the storage of a tensor: {persistent_id!r}")
        record = records.get(f"{prefix}data/{key}")
        num_bytes = count * (dtype.itemsize if dtype else 1)
        if record is None or record.size < num_bytes:
            found = "is missing" if record is None else f"has {record.size} bytes"
            raise DamagedFile(f"{path}: the record {prefix}data/{key} {found}, a tensor there needs {num_bytes} bytes")
        return StoredStorage(dtype, num_bytes, path, record.position)

    return find


def _load(data: bytes, where: str, tensors: Callable[[Any], Any] | None) -> tuple[Any, set[str]]:
    reader = _RestrictedUnpickler(data, where, tensors)
    try:
        return reader.load(), reader.device_tags
    except UnsafePickle as error:
        message = str(error)
        raise UnsafePickle(message if where in message else f"{where} is not read: {message}") from error
    except DamagedFile:
        raise
    except (MemoryError, RecursionError) as error:
        raise UnsafePickle(f"{where} is not read: its pickle exhausts the memory ({type(error).__name__})") from error
    except Exception as error:
        # Whatever a broken pickle makes of its stack machine: EOFError, UnpicklingError, KeyError, TypeError ...
        raise DamagedFile(f"{where} holds a pickle that is cut off or damaged ({error})") from error


class _RestrictedUnpickler(pickle.Unpickler):
    def __init__(self, data: bytes, where: str, tensors: Callable[[Any], Any] | None) -> None:
        super().__init__(io.BytesIO(data))
        self.where = where
        self.tensors = tensors
        self.device_tags: set[str] = set()
        self.classes: dict[str, type[Opaque]] = {}

    def persistent_load(self, pid: Any) -> Any:
        if self.tensors is None:
            raise UnsafePickle(f"{self.where} refers to data outside its pickle ({pid!r}), which has no place here")
        found = self.tensors(pid)
        if isinstance(pid, tuple) and len(pid) > 3 and isinstance(pid[3], str):
            self.device_tags.add(pid[3])
        return found

    def find_class(self, module: str, name: str) -> Any:
        full = f"{'builtins' if module == '__builtin__' else module}.{name}"
        full = _OLD_NAMES.get(full, full)
        if full in ("io.BytesIO", "_io.BytesIO"):
            return io.BytesIO
        if full == "torch.device":
            return Constructor(full, self._device)
        if full in HARMLESS:
            return HARMLESS[full]
        if full in STAND_IN_CLASSES or any(
            module == room or module.startswith(room + ".") for room in STAND_IN_MODULES
        ):
            return self._stand_in(full)
        raise UnsafePickle(
            f"{self.where} is not read: its pickle asks for {full}, which is not on the list of harmless things; if "
            "you trust the file, open it where it was written and save it again with tensors and plain values only"
        )

    def _stand_in(self, full: str) -> type[Opaque]:
        if full not in self.classes:
            self.classes[full] = opaque_class(full)
        return self.classes[full]

    def _device(self, *args: Any) -> Opaque:
        self.device_tags.add(":".join(str(arg) for arg in args))
        return self._stand_in("torch.device")(*args)
