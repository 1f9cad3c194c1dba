"""Between Hugging Face folders and training checkpoints, both ways, in one process without a device.

megatron-core must have been adapted to the CPU before this is imported (`platform.mcore_shims`).
"""

from __future__ import annotations

import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_rb.checkpoint.hf.reader import HFReader
from megatron_rb.checkpoint.hf.table import weight_table
from megatron_rb.checkpoint.hf.writer import (
    Written,
    hf_tensors,
    plan_shards,
    reread,
    shard_name,
    write_config,
    write_index,
    write_shard,
)
from megatron_rb.checkpoint.manager import check_same_model, complete_steps, is_checkpoint, read_manifest, save_weights
from megatron_rb.models.layers import LocalLayers
from megatron_rb.models.robobrain.build import (
    DTYPES,
    ModelOptions,
    build_stages,
    default_layout,
    named_parameters,
    weight_key,
)
from megatron_rb.models.robobrain.config import RoboBrainShape, load_shape, model_fingerprint
from megatron_rb.parallel.groups import Place, build_groups, destroy_groups
from megatron_rb.parallel.sharding import ShardSpec, shard_of, sharded_tensor, stored_shape, stored_to_full
from megatron_rb.platform.base import Platform

SIDE_FOLDER = "hf"
"""Where a checkpoint, or a folder of checkpoints, keeps config, tokenizer and processor of its model."""
WEIGHT_FILES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf", ".h5")
TEMPLATE_FOLDER = "additional_chat_templates"
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)
LONE = Place(0, 1, 0, 1, 0, 1, 1, 0, 1)
"""The place of a process that is alone."""


class Report(Protocol):
    """Told how far a conversion is."""

    def __call__(self, doing: str, done: int, total: int) -> None: ...


@dataclass(frozen=True)
class Summary:
    """What a conversion has made."""

    folder: Path
    num_tensors: int
    num_parameters: int
    num_bytes: int
    dtypes: tuple[str, ...]
    num_files: int


def import_folder(hf: str | Path, out: str | Path, dtype: str, platform: Platform, report: Report) -> Summary:
    """Turn a Hugging Face folder into a checkpoint of step 0 that holds weights only and opens under any layout.

    Needs memory for all weights at once, in the type they are stored in.

    Raises:
        ValueError: the folder is no RoboBrain model, lacks tensors, or `out` is taken.
    """
    target = target_dtype(dtype)
    shape = load_shape(hf)
    reader = HFReader(hf, shape)
    weights, tensors = {}, []
    with _new_folder(out) as folder, _lone_process_group(platform):
        specs = _specs(shape)
        for done, (name, spec) in enumerate(specs.items(), start=1):
            full = _as_type(reader.read(name), target)
            if tuple(full.shape) != spec.full_shape:
                found = tuple(full.shape)
                raise ValueError(f"{name} has the shape {found} in {hf}; its config.json says {spec.full_shape}")
            weights[name] = sharded_tensor(name, full, spec, tp_rank=0, tp_size=1, dp_rank=0)
            tensors.append(full)
            report("reading", done, len(specs))
        report("writing", 0, 1)
        save_weights(weights, model_fingerprint(shape), platform, folder)
        copy_side_files(hf, folder / SIDE_FOLDER)
        report("writing", 1, 1)
    return _summary(Path(out), tensors, len(list(Path(out).glob("*.distcp"))))


def export_checkpoint(
    checkpoint: str | Path, out: str | Path, hf: str, dtype: str, max_shard_size: str, platform: Platform,
    report: Report,
) -> Summary:  # fmt: skip
    """Turn a checkpoint of any layout into a Hugging Face folder; reads one shard at a time.

    Everything written is read again and compared bit by bit before the folder gets its name.

    Args:
        checkpoint: a checkpoint, the folder of a run's checkpoints, or the run's folder; of several the newest.
        hf: folder to take config, tokenizer and processor files from; empty = those kept with the checkpoint.

    Raises:
        ValueError: there is no checkpoint, it is of another model, its files are unknown, or `out` is taken.
    """
    target, max_bytes = target_dtype(dtype), parse_size(max_shard_size)
    source = find_checkpoint(checkpoint)
    manifest = read_manifest(source)
    side_files = find_side_files(source, hf)
    shape = load_shape(side_files)
    check_same_model(manifest, model_fingerprint(shape), source)
    rules = weight_table(shape)
    written = Written()
    with _new_folder(out) as folder, _lone_process_group(platform):
        stored = StoredWeights(source, _specs(shape))
        shards = plan_shards(stored.sizes(target), max_bytes)
        copy_side_files(side_files, folder)
        for index, names in enumerate(shards):
            report("exporting", index, len(shards))
            tensors = hf_tensors({n: _as_type(t, target) for n, t in stored.read(names)}, rules, shape.family)
            write_shard(folder / shard_name(index, len(shards)), tensors, written)
        report("exporting", len(shards), len(shards))
        write_index(folder, written)
        write_config(side_files / "config.json", folder / "config.json", written.dtypes)
        _check_written(folder, written, report)
    return Summary(
        Path(out), len(written.files), written.num_parameters, written.num_bytes, _names(written.dtypes), len(shards)
    )


class StoredWeights:
    """The full parameters of a checkpoint, read by name and independent of the layout that saved them.

    Raises:
        ValueError: files are missing, or names and shapes are not those of the model.
    """

    def __init__(self, folder: Path, specs: dict[str, ShardSpec]) -> None:
        self.folder = folder
        self.specs = specs
        if not (folder / ".metadata").is_file():
            raise ValueError(f"{folder} is damaged: it has no .metadata")
        metadata = dcp.FileSystemReader(folder).read_metadata()
        entries = metadata.state_dict_metadata
        self.entries = {key: entry for key, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
        lacking = sorted(specs.keys() - self.entries.keys())
        if lacking:
            raise ValueError(f"{folder} lacks {len(lacking)} parameters of its model, e.g. {', '.join(lacking[:3])}")
        for name, spec in specs.items():
            found, wanted = tuple(self.entries[name].size), stored_shape(spec)
            if found != wanted:
                raise ValueError(f"{name} has the shape {found} in {folder}, its model needs {wanted}")
        paths = {info.relative_path for info in (metadata.storage_data or {}).values()}
        absent = sorted(path for path in paths if not (folder / path).is_file())
        if absent:
            raise ValueError(f"{folder} is damaged: {len(absent)} of its files are missing, e.g. {absent[0]}")

    def sizes(self, dtype: torch.dtype | None) -> dict[str, int]:
        """Bytes of every parameter in a type (None = the stored one)."""
        return {
            name: torch.Size(spec.full_shape).numel() * (dtype or self.entries[name].properties.dtype).itemsize
            for name, spec in self.specs.items()
        }

    def read(self, names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Full values of several parameters in their stored type."""
        entries = {name: self.entries[name] for name in names}
        buffers = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
        dcp.load(buffers, storage_reader=dcp.FileSystemReader(self.folder))
        while buffers:
            name, value = buffers.popitem()
            yield name, stored_to_full(value, self.specs[name])


def copy_side_files(hf_path: str | Path, target: str | Path) -> None:
    """Copy what a Hugging Face folder holds beside its weights: config, tokenizer, processor, chat templates.

    A target that has a config.json already is left as it is.
    """
    source, target = Path(hf_path), Path(target)
    if (target / "config.json").is_file():
        return
    if not (source / "config.json").is_file():
        raise ValueError(f"{source} has no config.json; name a Hugging Face folder")
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir(), key=lambda path: (path.name == "config.json", path.name)):  # config.json last
        if path.is_file() and not path.name.startswith(".") and not path.name.endswith(WEIGHT_FILES):
            shutil.copyfile(path, target / path.name)
    if (source / TEMPLATE_FOLDER).is_dir():
        shutil.copytree(source / TEMPLATE_FOLDER, target / TEMPLATE_FOLDER, dirs_exist_ok=True)


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint a path names: itself, or the newest complete one in the folder or in its `checkpoints`."""
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"there is no checkpoint folder {path}")
    if is_checkpoint(path):
        return path
    for folder in (path, path / "checkpoints"):
        steps = complete_steps(folder)
        if steps:
            return folder / f"step_{max(steps):08d}"
    raise ValueError(f"{path} is neither a checkpoint nor a folder with complete ones (step_00000040 and the like)")


def find_side_files(checkpoint: Path, hf: str) -> Path:
    """Folder with config, tokenizer and processor: the one asked for, else that of the checkpoint or of its run."""
    if hf:
        return Path(hf)
    for folder in (checkpoint / SIDE_FOLDER, checkpoint.parent / SIDE_FOLDER):
        if (folder / "config.json").is_file():
            return folder
    raise ValueError(f"{checkpoint} comes without config and tokenizer files; name their Hugging Face folder with --hf")


def target_dtype(name: str) -> torch.dtype | None:
    """The type weights are converted to; None keeps theirs."""
    if name == "keep":
        return None
    if name not in DTYPES:
        raise ValueError(f"dtype '{name}' is not known; use keep, {' or '.join(DTYPES)}")
    return DTYPES[name]


def parse_size(text: str) -> int:
    """Bytes of `5GB`, `500MB`, `2GiB` or a plain number."""
    match = SIZE.fullmatch(text.strip())
    if not match or float(match.group(1)) == 0:
        raise ValueError(f"'{text}' is not a size; write it like 5GB or 500MB")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " "))


def model_specs(shape: RoboBrainShape, platform: Platform) -> dict[str, ShardSpec]:
    """Full shape and cut of every parameter of a model, by the name it is stored under; tied weights appear once."""
    with _lone_process_group(platform):
        return _specs(shape)


def _specs(shape: RoboBrainShape) -> dict[str, ShardSpec]:
    stages = build_stages(shape, default_layout(shape, 1), LONE, ModelOptions(), LocalLayers(), "meta")
    return {weight_key(name, shape): shard_of(parameter) for name, parameter in named_parameters(stages)}


@contextmanager
def _lone_process_group(platform: Platform) -> Iterator[None]:
    """A world of this process alone, whatever a scheduler's environment says; megatron-core builds nothing without."""
    started = not dist.is_initialized()
    if started:
        dist.init_process_group(platform.collective_backend, store=dist.HashStore(), rank=0, world_size=1)
    build_groups(1, 1, 1, timeout_minutes=10, seed=0)
    try:
        yield
    finally:
        destroy_groups()
        if started:
            dist.destroy_process_group()


@contextmanager
def _new_folder(out: str | Path) -> Iterator[Path]:
    """A folder under another name that becomes `out` when all went well, and vanishes when not."""
    final = Path(out).resolve()
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise ValueError(f"{out} exists already; choose another folder for --out, or delete it")
    final.parent.mkdir(parents=True, exist_ok=True)
    writing = final.with_name(f"{final.name}.writing-{secrets.token_hex(4)}")
    writing.mkdir()
    try:
        yield writing
        writing.rename(final)
    except BaseException:
        shutil.rmtree(writing, ignore_errors=True)
        raise


def _check_written(folder: Path, written: Written, report: Report) -> None:
    wrong = []
    for done, (name, equal) in enumerate(reread(folder, written), start=1):
        wrong += [] if equal else [name]
        report("comparing", done, len(written.files))
    if wrong:
        raise ValueError(
            f"{len(wrong)} tensors read back from the new folder differ from the checkpoint, e.g. {wrong[0]}; "
            "the disk or the memory is at fault, nothing was exported"
        )


def _as_type(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return tensor if dtype is None else tensor.to(dtype)


def _summary(folder: Path, tensors: list[torch.Tensor], num_files: int) -> Summary:
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    num_parameters = sum(tensor.numel() for tensor in tensors)
    return Summary(folder, len(tensors), num_parameters, num_bytes, _names({t.dtype for t in tensors}), num_files)


def _names(dtypes: set[torch.dtype]) -> tuple[str, ...]:
    return tuple(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
