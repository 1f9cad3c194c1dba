"""Reads single tensors of a Hugging Face folder, from one or many safetensors files, without loading the rest."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from megatron_rb.checkpoint.hf.table import TEXT, VISUAL, weight_table
from megatron_rb.models.robobrain.config import RoboBrainShape


class HFReader:
    """Full native tensors by native name, read on demand.

    Raises:
        ValueError: the folder has no safetensors weights, or misses a tensor of the model.
    """

    def __init__(self, folder: str | Path, shape: RoboBrainShape) -> None:
        self.folder = Path(folder)
        self.rules = weight_table(shape)
        self.files = _tensor_files(self.folder)
        self.canonical = {canonical_name(name): name for name in self.files}
        self._check(shape)

    def read(self, native_name: str) -> torch.Tensor:
        """The full (global, unpadded) value of one native parameter in the type of the file."""
        rule = self.rules[native_name]
        return rule.join([self.read_hf(name) for name in rule.hf_names])

    def read_hf(self, name: str) -> torch.Tensor:
        """One tensor by its canonical Hugging Face name."""
        stored = self.canonical[name]
        path = self.folder / self.files[stored]
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(stored)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or incomplete ({error}); fetch it again") from error

    def _check(self, shape: RoboBrainShape) -> None:
        absent = sorted({file for file in self.files.values() if not (self.folder / file).is_file()})
        if absent:
            raise ValueError(f"{self.folder} lacks {', '.join(absent)}, which its index names; fetch the whole folder")
        wanted = {name for rule in self.rules.values() for name in rule.hf_names}
        found = set(self.canonical)
        if shape.text.tied_embeddings:
            found.discard("lm_head.weight")  # a copy of the embedding that some writers store
        missing, extra = sorted(wanted - found), sorted(found - wanted)
        if missing or extra:
            raise ValueError(
                f"{self.folder} does not hold the model of its config.json: {len(missing)} tensors are missing "
                f"({', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}), {len(extra)} are not part of it "
                f"({', '.join(extra[:3])}{' ...' if len(extra) > 3 else ''})"
            )


def canonical_name(name: str) -> str:
    """Names of all transformers releases to the current `model.visual.*`, `model.language_model.*`, `lm_head.*`."""
    if name.startswith(("lm_head.", f"{VISUAL}.", f"{TEXT}.")):
        return name
    if name.startswith("visual."):
        return f"model.{name}"
    if name.startswith("language_model.lm_head."):
        return name.removeprefix("language_model.")
    for old in ("language_model.model.", "model."):
        if name.startswith(old):
            return f"{TEXT}.{name.removeprefix(old)}"
    return name


def _tensor_files(folder: Path) -> dict[str, str]:
    """File of every tensor in a folder."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return json.loads(index.read_text())["weight_map"]
    single = folder / "model.safetensors"
    if not single.is_file():
        raise ValueError(f"{folder} has neither model.safetensors nor model.safetensors.index.json")
    with safe_open(single, framework="pt") as file:
        return {name: single.name for name in file.keys()}
