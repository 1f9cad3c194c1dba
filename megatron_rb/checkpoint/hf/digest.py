"""A digest of the weights of a Hugging Face folder: what an adapter belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from megatron_rb.checkpoint.hf.reader import HFReader
from megatron_rb.checkpoint.storage.checksum import Checksum, checksum
from megatron_rb.checkpoint.storage.tensors import as_bytes
from megatron_rb.shapes.shape import RoboBrainShape


def tensor_digest(tensor: torch.Tensor) -> str:
    """Of values, type and shape."""
    told = Checksum()
    told.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    told.update(as_bytes(tensor.contiguous()).data)
    return told.hexdigest()


def combined_digest(digests: Mapping[str, str]) -> str:
    """Of the digests of all tensors, by their canonical names."""
    return checksum("".join(f"{name} {digests[name]}\n" for name in sorted(digests)).encode())


class DigestingReader(HFReader):
    """Notes the digest of every tensor that it reads."""

    def __init__(self, folder: str | Path, shape: RoboBrainShape) -> None:
        super().__init__(folder, shape)
        self.digests: dict[str, str] = {}
        """By canonical name."""

    def read_hf(self, name: str) -> torch.Tensor:
        tensor = super().read_hf(name)
        self.digests[name] = tensor_digest(tensor)
        return tensor
