"""Reads single tensors of a Hugging Face folder, from one or many files, without loading the rest."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_rb.checkpoint.hf.folder import EMBEDDING, find_tensors, match_tensors
from megatron_rb.checkpoint.hf.table import weight_table
from megatron_rb.checkpoint.hf.tied import check_tied
from megatron_rb.checkpoint.storage.block_scales import read_values
from megatron_rb.checkpoint.storage.tensors import open_files
from megatron_rb.shapes.shape import RoboBrainShape


class HFReader:
    """Full native tensors by native name, read on demand.

    Raises:
        ValueError: the folder has no weights, misses a tensor of the model, or holds one of another shape.
    """

    def __init__(self, folder: str | Path, shape: RoboBrainShape) -> None:
        self.folder = Path(folder)
        self.rules = weight_table(shape)
        self.matched = match_tensors(self.folder, find_tensors(self.folder), shape)

    def read(self, native_name: str) -> torch.Tensor:
        """The full (global, unpadded) value of one native parameter, in the type of the file where that is not fp8."""
        rule = self.rules[native_name]
        return rule.join([self.read_hf(name) for name in rule.hf_names])

    def read_hf(self, name: str) -> torch.Tensor:
        """One tensor by its canonical Hugging Face name.

        Raises:
            ValueError: it is a tied embedding whose stored copy differs.
        """
        tensor = self.matched.tensors[name]
        with open_files() as pool:
            if name == EMBEDDING:
                check_tied(self.folder, tensor, self.matched.head_copy, pool)
            return read_values(pool, tensor)
