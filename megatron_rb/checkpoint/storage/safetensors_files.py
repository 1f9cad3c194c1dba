"""Safetensors files: where their tensors lie, and how one is written from a stream.

Format: 8 bytes length of the header, little-endian; a JSON header; the tensors without gaps.
https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from pathlib import Path

import torch

from megatron_rb.checkpoint.storage.tensors import DamagedFile, StoredChunk, StoredTensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    **({"F8_E8M0": torch.float8_e8m0fnu} if hasattr(torch, "float8_e8m0fnu") else {}),
    **{f"U{8 * dtype.itemsize}": dtype for dtype in (torch.uint16, torch.uint32, torch.uint64)},
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LONGEST_HEADER = 100_000_000
"""Bytes; the limit of the format's own reader."""


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file by name, in the order of their bytes; only the header is read.

    Raises:
        DamagedFile: the file is cut off, or its header is not one.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(LONGEST_HEADER, size - 8):
            raise DamagedFile(f"{path} is no safetensors file, or its beginning is lost; fetch it again")
        text = file.read(length)
    try:
        header = json.loads(text)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        tensors = {name: _tensor(path, name, entry, 8 + length) for name, entry in entries.items()}
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise DamagedFile(f"{path} has a broken safetensors header ({error}); fetch it again") from error
    _check_extent(path, tensors, 8 + length, size)
    return dict(sorted(tensors.items(), key=lambda item: item[1].chunks[0].position))


def _tensor(path: Path, name: str, entry: dict, data: int) -> StoredTensor:
    if entry["dtype"] not in DTYPES:
        if str(entry["dtype"]).startswith(("F4", "F6", "F8")):
            raise ValueError(
                f"{path} holds quantised weights: {name} is stored as {entry['dtype']}; name the folder it was "
                "quantised from, or dequantise it with the tool that made it"
            )
        raise DamagedFile(f"{path}: {name} has the type {entry['dtype']}, which is not known")
    dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise DamagedFile(f"{path}: {name} has {end - begin} bytes, its shape {shape} and type need another number")
    return StoredTensor(name, dtype, shape, (StoredChunk((0,) * len(shape), shape, path, data + begin),))


def _check_extent(path: Path, tensors: dict[str, StoredTensor], data: int, size: int) -> None:
    position = data
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.chunks[0].position, tensor.num_bytes)):
        if tensor.chunks[0].position != position:
            raise DamagedFile(f"{path}: the bytes of {tensor.name} overlap or leave a gap; fetch the file again")
        position += tensor.num_bytes
    if position != size:
        cut = "is cut off" if size < position else "has bytes behind its last tensor"
        raise DamagedFile(f"{path} {cut}: it has {size} bytes, its header speaks of {position}; fetch it again")


def safetensors_header(tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> bytes:
    """The beginning of a file that holds these tensors in this order."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, dtype, shape in tensors:
        end = position + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8
    return struct.pack("<Q", len(text)) + text
