"""Whether two folders hold the same tensors: both are read again from the disk and compared by checksum."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_rb.checkpoint.conversion.export_hf import export_targets, model_tensors
from megatron_rb.checkpoint.conversion.migrate import portable_common
from megatron_rb.checkpoint.conversion.outcome import COMPARING
from megatron_rb.checkpoint.conversion.stream import Job, Progress, Silent, Target, TensorCopy, TensorRows
from megatron_rb.checkpoint.conversion.workspace import in_parallel
from megatron_rb.checkpoint.hf.folder import EMBEDDING, HEAD, find_tensors
from megatron_rb.checkpoint.hf.names import canonical_name
from megatron_rb.checkpoint.hf.non_parameters import non_parameter
from megatron_rb.checkpoint.hf.tied import check_tied
from megatron_rb.checkpoint.manifest import find_checkpoint, find_side_files
from megatron_rb.checkpoint.storage.tensors import FilePool, StoredTensor, open_files
from megatron_rb.checkpoint.storage.torch_dist import read_dist_folder
from megatron_rb.shapes.shape import load_shape

MISSING, EXTRA, DTYPE, SHAPE, BYTES, SCALARS = "missing in B", "missing in A", "dtype", "shape", "bytes", "scalars"


@dataclass(frozen=True)
class FolderDifference:
    """One thing that is not the same."""

    name: str
    what: str
    a: str
    b: str


@dataclass
class FolderComparison:
    """The result for two folders."""

    a: str
    b: str
    names: str
    """Whose names the tensors have: `Hugging Face` or `checkpoint`."""
    compared: int = 0
    num_bytes: int = 0
    nans: int = 0
    """NaNs in A; their payloads are part of the comparison."""
    differences: list[FolderDifference] = field(default_factory=list)
    forward: float | None = None
    """Largest absolute difference of a logit, where it was asked for."""
    forward_limit: float | None = None
    """What it may be."""

    @property
    def equal(self) -> bool:
        """The tensors are the same."""
        return not self.differences

    @property
    def forward_equal(self) -> bool:
        """The logits are the same within their limit, or were not asked for."""
        return self.forward is None or self.forward_limit is None or self.forward <= self.forward_limit

    @property
    def rounded_to(self) -> set[str]:
        """Types that tensors have on one side alone."""
        return {name for entry in self.differences if entry.what == DTYPE for name in (entry.a, entry.b)}

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"equal": self.equal, "forward_equal": self.forward_equal}


@dataclass(frozen=True)
class Side:
    """One of the folders."""

    path: Path
    checkpoint: Path | None
    """The checkpoint it is or contains; None for a Hugging Face folder."""


def verify(a: str | Path, b: str | Path, progress: Progress | None = None, hf: str = "") -> FolderComparison:
    """Compare every logical tensor of two folders, each a Hugging Face folder or a checkpoint of any layout.

    Two checkpoints are compared with everything they hold, optimizer and scalars too; a checkpoint and a Hugging Face
    folder by the model's weights. Random states belong to devices and are not compared.

    Args:
        hf: config of checkpoints that come without one.

    Raises:
        ValueError: a folder is neither, or is damaged.
    """
    sides = find_side(a), find_side(b)
    both_checkpoints = all(side.checkpoint for side in sides)
    read = _checkpoint_tensors if both_checkpoints else _hf_tensors
    comparison = FolderComparison(str(a), str(b), "checkpoint" if both_checkpoints else "Hugging Face")
    with open_files() as pool:
        left, right = (read(side, hf, pool) for side in sides)
        job = Job(pool, progress or Silent())
        job.progress.total(COMPARING, sum(t.num_bytes for side in (left, right) for t in side.values()))
        shared = [name for name in left if name in right]
        actions: list[Callable[[], Any]] = [
            lambda name=name: (name, _digest(left[name], job), _digest(right[name], job))  # type: ignore[misc]
            for name in shared
        ]
        for name, (checksum_a, nans), (checksum_b, _) in in_parallel(actions, job):
            comparison.compared += 1
            comparison.num_bytes += left[name].num_bytes
            comparison.nans += nans
            comparison.differences += _differences(left[name], right[name], checksum_a, checksum_b)
    comparison.differences += [_absent(name, left[name], MISSING) for name in left if name not in right]
    comparison.differences += [_absent(name, right[name], EXTRA) for name in right if name not in left]
    if both_checkpoints:
        comparison.differences += _scalar_differences(*sides)
    comparison.differences.sort(key=lambda difference: difference.name)
    return comparison


def find_side(path: str | Path) -> Side:
    """What a path is."""
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"there is no folder {path}")
    if (path / "config.json").is_file():
        return Side(path, None)
    return Side(path, find_checkpoint(path))


def _checkpoint_tensors(side: Side, hf: str, pool: FilePool) -> dict[str, Target]:
    assert side.checkpoint is not None
    stored = read_dist_folder(side.checkpoint).tensors
    return {name: Target(name, t.dtype, t.shape, (TensorRows.whole(t),)) for name, t in stored.items()}


def _hf_tensors(side: Side, hf: str, pool: FilePool) -> dict[str, Target]:
    if side.checkpoint is None:
        return _folder_tensors(side.path, pool)
    shape = load_shape(find_side_files(side.checkpoint, hf))
    targets = export_targets(shape, model_tensors(side.checkpoint, shape), None)
    return {canonical_name(target.name): target for target in targets}


def _folder_tensors(folder: Path, pool: FilePool) -> dict[str, Target]:
    """Everything in a Hugging Face folder, known or not, but buffers; a tied head is the embedding, counted once."""
    found: dict[str, StoredTensor] = {}
    for stored_name, tensor in find_tensors(folder).items():
        name = canonical_name(stored_name)
        if name in found:
            raise ValueError(f"{folder} holds {name} twice, under two releases' names")
        if non_parameter(name) is None:
            found[name] = tensor
    if load_shape(folder).text.tied_embeddings and HEAD in found:
        head = found.pop(HEAD)
        check_tied(folder, found.setdefault(EMBEDDING, head), head, pool)
    return {name: Target(name, t.value_dtype, t.shape, (TensorRows.whole(t),)) for name, t in found.items()}


def _digest(target: Target, job: Job) -> tuple[str, int]:
    copy = TensorCopy(target, job)
    for _ in copy.blocks(COMPARING):
        pass
    return copy.checksum.hexdigest(), copy.nans


def _differences(a: Target, b: Target, checksum_a: str, checksum_b: str) -> list[FolderDifference]:
    if a.dtype != b.dtype:
        return [FolderDifference(a.name, DTYPE, _type_name(a.dtype), _type_name(b.dtype))]
    if a.shape != b.shape:
        return [FolderDifference(a.name, SHAPE, str(list(a.shape)), str(list(b.shape)))]
    return [] if checksum_a == checksum_b else [FolderDifference(a.name, BYTES, checksum_a, checksum_b)]


def _absent(name: str, target: Target, what: str) -> FolderDifference:
    form = f"{_type_name(target.dtype)} {list(target.shape)}"
    return FolderDifference(name, what, *((form, "") if what == MISSING else ("", form)))


def _type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _scalar_differences(a: Side, b: Side) -> list[FolderDifference]:
    """Step, parameter groups, schedule and data position, in the form in which no platform's switches are left."""
    left, right = (_flat(_scalars(side)) for side in (a, b))
    return [
        FolderDifference(key, SCALARS, repr(left.get(key)), repr(right.get(key)))
        for key in sorted(left.keys() | right.keys())
        if left.get(key) != right.get(key)
    ]


def _scalars(side: Side) -> dict[str, Any]:
    assert side.checkpoint is not None
    return portable_common(read_dist_folder(side.checkpoint).read_common(), "cpu", side.checkpoint)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list | tuple):
        items = [(str(index), item) for index, item in enumerate(value)]
    else:
        return {prefix.removesuffix("."): value}
    return {key: leaf for name, item in items for key, leaf in _flat(item, f"{prefix}{name}.").items()}
