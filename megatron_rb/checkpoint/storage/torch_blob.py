"""The bytes around a tensor in the format of `torch.save`, so that its data can be written as a stream.

The container is a zip file of uncompressed records: a pickle that describes the tensor, then its data.
https://github.com/pytorch/pytorch/blob/main/torch/serialization.py
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zlib
from collections import OrderedDict

import torch

STORAGES = {
    torch.float64: "DoubleStorage",
    torch.float32: "FloatStorage",
    torch.float16: "HalfStorage",
    torch.bfloat16: "BFloat16Storage",
    torch.int64: "LongStorage",
    torch.int32: "IntStorage",
    torch.int16: "ShortStorage",
    torch.int8: "CharStorage",
    torch.uint8: "ByteStorage",
    torch.bool: "BoolStorage",
}
LARGEST = (1 << 32) - (1 << 20)
"""Bytes of data for which the plain zip format suffices."""
ALIGNMENT = 64
"""Bytes; torch can map data that begins at a multiple of it."""


class _Storage:
    """Pickled as a reference to the record `data/0`."""

    def __init__(self, dtype: torch.dtype, elements: int) -> None:
        self.reference = ("storage", getattr(torch, STORAGES[dtype]), "0", "cpu", elements)


class _Tensor:
    def __init__(self, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        storage = _Storage(dtype, math.prod(shape))
        self.parts: tuple = (storage, 0, shape, strides, False, OrderedDict())

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, self.parts


class _StoragePickler(pickle.Pickler):
    def persistent_id(self, obj):
        return obj.reference if isinstance(obj, _Storage) else None


def blob_frame(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[bytes, bytes]:
    """What stands before and behind the data of a tensor.

    The checksum of the data record is left 0, as `torch.serialization.set_crc32_options(False)` does: torch does not
    read it, and it takes longer to compute than the data takes to write.

    Raises:
        ValueError: the tensor has 4 GiB or more, or a type that torch.save writes in another way.
    """
    size = math.prod(shape) * dtype.itemsize
    if dtype not in STORAGES or size > LARGEST:
        raise ValueError(f"a tensor of {size} bytes of {dtype} cannot be written as a stream")
    description = io.BytesIO()
    _StoragePickler(description, protocol=2).dump(_Tensor(dtype, shape))
    zip_file = _Zip()
    zip_file.add("data.pkl", description.getvalue())
    zip_file.add("byteorder", b"little")
    zip_file.add_header("data/0", size, crc=0, aligned=True)
    before, zip_file.written = bytes(zip_file.written), bytearray()
    zip_file.position += size
    zip_file.add("version", b"3\n")
    zip_file.close()
    return before, bytes(zip_file.written)


class _Zip:
    """A zip file of stored records, as far as it is needed here."""

    def __init__(self) -> None:
        self.written = bytearray()
        self.position = 0
        self.directory = bytearray()
        self.count = 0

    def add(self, name: str, data: bytes) -> None:
        self.add_header(name, len(data), zlib.crc32(data))
        self._write(data)

    def add_header(self, name: str, size: int, crc: int, aligned: bool = False) -> None:
        path = f"archive/{name}".encode()
        extra = b""
        if aligned:
            padding = -(self.position + 30 + len(path) + 4) % ALIGNMENT
            extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
        # version needed, flags (names are UTF-8), method 0 = stored, time, date (1 January 1980), crc, sizes
        common = struct.pack("<HHHHHIIIH", 20, 0x0800, 0, 0, 0x21, crc, size, size, len(path))
        self.directory += b"PK\x01\x02" + struct.pack("<H", 20) + common
        self.directory += struct.pack("<HHHHII", 0, 0, 0, 0, 0, self.position) + path
        self.count += 1
        self._write(b"PK\x03\x04" + common + struct.pack("<H", len(extra)) + path + extra)

    def close(self) -> None:
        start = self.position
        self._write(bytes(self.directory))
        self._write(
            b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, self.count, self.count, len(self.directory), start, 0)
        )

    def _write(self, data: bytes) -> None:
        self.written += data
        self.position += len(data)
