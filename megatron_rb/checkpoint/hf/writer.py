"""Writes the weights of a Hugging Face folder: safetensors shards of a bounded size and their index."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from megatron_rb.checkpoint.hf.table import TEXT, VISUAL, WeightRule

DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass
class Written:
    """The tensors of a folder, as they were given to its files."""

    files: dict[str, str] = field(default_factory=dict)
    """File of every tensor."""
    hashes: dict[str, str] = field(default_factory=dict)
    """`tensor_hash` of every tensor."""
    dtypes: set[torch.dtype] = field(default_factory=set)
    num_bytes: int = 0
    num_parameters: int = 0


def plan_shards(sizes: Mapping[str, int], max_shard_bytes: int) -> list[list[str]]:
    """Names of each shard, filled in order and closed when the next does not fit; one alone may exceed the limit."""
    shards: list[list[str]] = []
    filled = 0
    for name, size in sizes.items():
        if not shards or filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def shard_name(index: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def hf_tensors(fulls: dict[str, torch.Tensor], rules: Mapping[str, WeightRule], family: str) -> dict[str, torch.Tensor]:
    """Full native parameters as Hugging Face tensors; empties its argument as it goes, so that memory stays bounded."""
    tensors = {}
    while fulls:
        native_name, full = fulls.popitem()
        rule = rules[native_name]
        for name, part in zip(rule.hf_names, rule.split(full), strict=True):
            # A copy: a view keeps the joined tensor alive, and safetensors refuses tensors that share memory.
            tensors[exported_name(name, family)] = part.clone(memory_format=torch.contiguous_format)
    return tensors


def write_shard(path: Path, tensors: Mapping[str, torch.Tensor], written: Written) -> None:
    """Write one file and note its tensors."""
    for name, tensor in tensors.items():
        written.files[name] = path.name
        written.hashes[name] = tensor_hash(tensor)
        written.dtypes.add(tensor.dtype)
        written.num_bytes += tensor.numel() * tensor.element_size()
        written.num_parameters += tensor.numel()
    save_file(dict(tensors), path, metadata={"format": "pt"})


def write_index(folder: Path, written: Written) -> None:
    """Write the index of several shards; a single file needs none."""
    if len(set(written.files.values())) == 1:
        return
    totals = {"total_parameters": written.num_parameters, "total_size": written.num_bytes}
    index = {"metadata": totals, "weight_map": dict(sorted(written.files.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_config(source: Path, target: Path, dtypes: set[torch.dtype]) -> None:
    """Copy a config.json; where all weights have one type, its statements of the type are set to it."""
    config = json.loads(source.read_text())
    if len(dtypes) == 1:
        name = DTYPE_NAMES[next(iter(dtypes))]
        keys = ("dtype", "torch_dtype")
        for section in (config, *(part for part in config.values() if isinstance(part, dict))):
            section.update({key: name for key in keys if key in section})
        if not any(key in config for key in keys):
            config["torch_dtype"] = name  # all releases of transformers read this word
    target.write_text(json.dumps(config, indent=2) + "\n")


def exported_name(canonical: str, family: str) -> str:
    """The name that published folders use and both transformers and serving stacks load.

    Qwen3-VL: the canonical one. Qwen2.5-VL: `visual.*` and `model.*`, as on the hub.
    """
    if family == "qwen2_5_vl":
        for prefix, published in ((f"{VISUAL}.", "visual."), (f"{TEXT}.", "model.")):
            if canonical.startswith(prefix):
                return published + canonical.removeprefix(prefix)
    return canonical


def reread(folder: Path, written: Written) -> Iterator[tuple[str, bool]]:
    """Read every tensor of the folder again; yields its name and whether its bytes are those that were given."""
    for file in sorted(set(written.files.values())):
        with safe_open(folder / file, framework="pt") as stored:
            for name in sorted(name for name, place in written.files.items() if place == file):
                yield name, tensor_hash(stored.get_tensor(name)) == written.hashes[name]


def tensor_hash(tensor: torch.Tensor) -> str:
    """SHA-256 of type, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
