"""Adapters merged into their base weights: a Hugging Face folder that needs no peft.

The product of the factors is added in fp32 and rounded once. In bf16 a small update rounds away in part, or whole: how
much of it arrives is stated for every tensor.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_rb.checkpoint.conversion.export_adapters import export_adapter, open_adapter_checkpoint
from megatron_rb.checkpoint.conversion.export_hf import write_index
from megatron_rb.checkpoint.conversion.files import WRITING, FileRecord
from megatron_rb.checkpoint.conversion.options import parse_size, target_dtype
from megatron_rb.checkpoint.conversion.outcome import Outcome, Summary, check_written, files_identity
from megatron_rb.checkpoint.conversion.stream import MANIFEST, Copied, Job, Progress, Silent
from megatron_rb.checkpoint.conversion.workspace import Workspace
from megatron_rb.checkpoint.hf.adapters import WEIGHTS, PeftFolder, open_adapter
from megatron_rb.checkpoint.hf.digest import combined_digest, tensor_digest
from megatron_rb.checkpoint.hf.folder import find_tensors
from megatron_rb.checkpoint.hf.names import exported_name, shard_name
from megatron_rb.checkpoint.hf.reader import HFReader
from megatron_rb.checkpoint.hf.side_files import copy_side_files, write_config
from megatron_rb.checkpoint.storage.checksum import checksum, count_not_finite
from megatron_rb.checkpoint.storage.safetensors_files import safetensors_header
from megatron_rb.checkpoint.storage.tensors import as_bytes, open_files
from megatron_rb.shapes.shape import load_shape

WORST = 3
"""Tensors that the summary names."""


@dataclass
class Rounding:
    """What of an update is left after rounding."""

    update: float
    """Frobenius norm of the update in fp32."""
    lost: float
    """Frobenius norm of the difference between the rounded sum and the sum in fp32, as a share of the update's."""
    unchanged: float
    """Share of the elements that the update was to change and that rounding left as they were."""


@dataclass
class Merging:
    """Base and adapters, and what is found on the way."""

    reader: HFReader
    adapters: Sequence[PeftFolder]
    dtype: torch.dtype | None
    """Of what is written; None = that of the base."""
    digests: dict[str, str] = field(default_factory=dict)
    rounding: dict[str, Rounding] = field(default_factory=dict)

    def tensor(self, name: str) -> torch.Tensor:
        """A merged tensor by its canonical name."""
        base = self.reader.read_hf(name)
        self.digests[name] = tensor_digest(base)
        target = self.dtype or base.dtype
        whole = [each for each in self.adapters if name in each.in_full]
        exact = whole[0].read(name).float() if whole else base.float()
        updates = [each.update(name) for each in self.adapters if each.changes(name)]
        if not updates:
            return (whole[0].read(name) if whole else base).to(target)
        update = torch.stack(updates).sum(0) if len(updates) > 1 else updates[0]
        merged = (exact + update).to(target)
        self.rounding[name] = _rounding(exact, update, merged)
        return merged


def _rounding(base: torch.Tensor, update: torch.Tensor, merged: torch.Tensor) -> Rounding:
    size, meant = float(update.norm()), update != 0
    lost = float((merged.float() - (base + update)).norm())
    left = int((meant & (merged.float() == base)).sum())
    return Rounding(size, lost / size if size else 0.0, left / max(int(meant.sum()), 1))


def merge_adapters(
    base: str | Path,
    adapters: Sequence[str | Path],
    out: str | Path,
    dtype: str = "keep",
    max_shard_size: str = "5GB",
    progress: Progress | None = None,
) -> Summary:
    """Write the base weights with the products of the adapters' factors added.

    Raises:
        ValueError: an adapter is of another kind or of another base, two of them have a tensor in full, or `out` is
            taken.
    """
    base, shape = Path(base), load_shape(base)
    opened = [open_adapter(folder, f"adapter_{number}", shape) for number, folder in enumerate(adapters)]
    _check_in_full(opened)
    merging = Merging(HFReader(base, shape), opened, target_dtype(dtype))
    tensors = merging.reader.matched.tensors
    sizes = {
        name: stored.num_bytes // stored.dtype.itemsize * (merging.dtype or stored.value_dtype).itemsize
        for name, stored in tensors.items()
    }
    groups = _groups(sizes, parse_size(max_shard_size))
    files = {shard_name(index, len(groups)): group for index, group in enumerate(groups)}
    sources = {path for stored in tensors.values() for path in stored.paths}
    sources |= {folder.folder / WEIGHTS for folder in opened}
    identity = {"merge": str(base.resolve()), "dtype": dtype, "shards": list(files), "files": files_identity(sources)}
    workspace = Workspace(out, identity)
    told = {"base": str(base.resolve()), "adapters": [str(each.folder.resolve()) for each in opened]}
    outcome = Outcome("merge", told, {}, {exported_name(name, shape.family): [name] for name in tensors})
    with open_files() as pool, workspace.opened(sum(sizes.values())):
        job = Job(pool, progress or Silent())
        job.progress.total(WRITING, sum(sizes.values()))
        writers = {name: partial(_write, names=group, merging=merging, job=job) for name, group in files.items()}
        outcome.records = workspace.write_files(writers, job)
        folder = workspace.folder
        with workspace.discarded_when_wrong():
            _check_base(merging, outcome, base)
            check_written(find_tensors(folder), outcome, job)
        copy_side_files(base, folder)
        write_index(folder, outcome)
        write_config(
            base / "config.json",
            folder / "config.json",
            {merging.dtype or each.value_dtype for each in tensors.values()},
        )
        outcome.extra = {"rounding": _told_rounding(outcome), "warnings": _warnings(outcome)}
        outcome.write(folder)
        workspace.publish()
    return outcome.summary(out)


def merge_checkpoint(
    checkpoint: str | Path,
    out: str | Path,
    hf: str = "",
    base: str = "",
    dtype: str = "keep",
    max_shard_size: str = "5GB",
    progress: Progress | None = None,
) -> Summary:
    """A checkpoint of adapters, merged into the weights that its run named as their base.

    Args:
        base: Hugging Face folder where those lie now; empty = where the run found them.
    """
    opened = open_adapter_checkpoint(checkpoint, hf)
    folder = base or opened.base
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(
            f"the base weights of {opened.folder} were {folder}, which is not there; name them with --base"
        )
    with tempfile.TemporaryDirectory(prefix="adapters-") as scratch:
        names = [adapter.name for adapter in opened.adapters]
        for name in names:
            export_adapter(checkpoint, Path(scratch) / name, hf, "keep", name)
        return merge_adapters(folder, [Path(scratch) / name for name in names], out, dtype, max_shard_size, progress)


def _check_in_full(opened: Sequence[PeftFolder]) -> None:
    for number, one in enumerate(opened):
        for other in opened[:number]:
            twice = sorted(set(one.in_full) & set(other.in_full))
            if twice and not torch.equal(one.read(twice[0]), other.read(twice[0])):
                raise ValueError(f"{one.folder} and {other.folder} have each its own {twice[0]}; merge one of them")


def _groups(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names of each file, in order."""
    groups: list[list[str]] = []
    filled = 0
    for name, size in sizes.items():
        if not groups or filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def _write(path: Path, names: Sequence[str], merging: Merging, job: Job) -> FileRecord:
    """Write one file, tensor by tensor, and return the record of its tensors."""
    family = load_shape(merging.reader.folder).family
    stored = merging.reader.matched.tensors
    described = [
        (exported_name(name, family), merging.dtype or stored[name].value_dtype, stored[name].shape) for name in names
    ]
    records: dict[str, Any] = {}
    with open(path, "wb") as file:
        file.write(safetensors_header(described))
        for name, (written, dtype, size) in zip(names, described, strict=True):
            data = as_bytes(merging.tensor(name).contiguous()).data
            file.write(data)
            nans, infinities = count_not_finite(data, dtype)
            record = Copied(written, dtype, size, checksum(data), nans, infinities, {}, None).as_json()
            records[written] = record | {"base": merging.digests[name]} | _as_json(merging.rounding.get(name))
            job.advance(WRITING, len(data))
    return {"tensors": records}


def _as_json(rounding: Rounding | None) -> dict[str, Any]:
    return {} if rounding is None else {"rounding": vars(rounding)}


def _check_base(merging: Merging, outcome: Outcome, base: Path) -> None:
    """Raise ValueError where an adapter says that it belongs to other weights."""
    names = {sources[0]: written for written, sources in outcome.key_map.items()}
    entries = outcome.tensors()
    found = combined_digest({name: entries[written]["base"] for name, written in names.items()})
    for adapter in merging.adapters:
        if adapter.digest and adapter.digest != found:
            raise ValueError(
                f"{adapter.folder} belongs to other base weights ({adapter.digest}) than those of {base} ({found}); "
                "name the folder that it was trained on"
            )


def _told_rounding(outcome: Outcome) -> dict[str, Any]:
    return {name: entry["rounding"] for name, entry in outcome.tensors().items() if "rounding" in entry}


def _warnings(outcome: Outcome) -> list[str]:
    found = _told_rounding(outcome)
    if not found:
        return []
    worst = sorted(found, key=lambda name: -found[name]["lost"])[:WORST]
    words = ", ".join(f"{name} {found[name]['lost']:.1%}" for name in worst)
    whole = sum(each["lost"] ** 2 * each["update"] ** 2 for each in found.values()) ** 0.5
    size = sum(each["update"] ** 2 for each in found.values()) ** 0.5
    return [
        f"{len(found)} tensors were changed; rounding took {whole / max(size, 1e-30):.2%} of the updates (Frobenius "
        f"norm), most of {words}; {MANIFEST} has every tensor"
    ]
