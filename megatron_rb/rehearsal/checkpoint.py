"""Saving and loading a checkpoint in a rehearsal: what stands in for files, and counts what they would hold."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_rb.checkpoint import fitting, stored
from megatron_rb.checkpoint.optimizer_state import optimizer_state
from megatron_rb.checkpoint.sharded import TrainingState, load_sharded, model_state, save_sharded
from megatron_rb.checkpoint.storage.tensors import StoredTensor
from megatron_rb.checkpoint.stored import Stored
from megatron_rb.parallel.boxes import TensorBox
from megatron_rb.parallel.sharding import Sharded, global_shape
from megatron_rb.platform import planning_trees
from megatron_rb.rehearsal.records import CheckpointBytes
from megatron_rb.rehearsal.stand_ins import StandIns
from megatron_rb.rehearsal.watch import Watch


@dataclass
class MovedBytes:
    """Bytes that have been moved so far."""

    copied: int = 0
    written: int = 0
    read: int = 0

    def record(self) -> CheckpointBytes:
        return CheckpointBytes(self.copied, self.written, self.read)


def rehearse_save(state: TrainingState, moved: MovedBytes) -> None:
    """Save up to the copies on the host; what a process in the background would write is counted."""
    with StandIns() as stand_ins, tempfile.TemporaryDirectory() as folder:
        _stand_in_for_other_ranks(stand_ins)
        request = save_sharded(state, Path(folder), asynchronous=True)
        assert request is not None
        if request.preload_fn is None:
            return
        _, buckets, _ = request.async_fn_args
        moved.copied += sum(_size(tensor) for tensor in _tensors(buckets) if tensor.device.type != "cpu")
        staged = request.preload_fn()
        moved.written += sum(_size(tensor) for tensor in _tensors(staged))
        moved.written += sum(len(blob.getbuffer()) for _, _, (blobs, _) in staged for _, blob in blobs)


def _stand_in_for_other_ranks(stand_ins: StandIns) -> None:
    """Rank 0 does not look at what all ranks would write: it has been told its own for each of them."""
    own: list[Any] = []

    def gather(plan: Any, group: Any = None) -> list[Any]:
        own.append(plan)
        return [plan] * dist.get_world_size(group)

    stand_ins.set(planning_trees, "gather_to_first", gather)
    stand_ins.set(planning_trees, "scatter_from_first", lambda plans, group=None: own[-1])
    stand_ins.set(MCoreSavePlanner, "create_global_plan", lambda planner, plans: (plans, SimpleNamespace()))
    # The queue of writers is a process of its own.
    stand_ins.set(filesystem_async, "_get_write_results_queue", lambda *_: None)


def _tensors(buckets: Iterable[tuple[Any, Any, tuple[Any, Any]]]) -> list[torch.Tensor]:
    return [tensor for _, _, (_, tensors) in buckets for _, tensor in tensors]


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.itemsize


def rehearse_load(state: TrainingState, moved: MovedBytes, watch: Watch) -> None:
    """Load a checkpoint of this run; what would be read of files is counted."""

    def read_box(pool: Any, blob: StoredTensor, box: TensorBox) -> torch.Tensor:
        moved.read += box.numel * blob.dtype.itemsize
        return watch.without_values(box.shape, blob.dtype)

    def find_blob(opened: Stored, index: Any, shape: tuple[int, ...]) -> StoredTensor:
        return StoredTensor(index.fqn, opened.tensor(index.fqn).properties.dtype, shape, ())

    metadata, common = _contents(state)
    gather = fitting.gather_from_all

    def needs_of_all(own: Any) -> list[Any]:
        """Ranks with the same weights leave it to the first of them to say what they need."""
        return [*gather(own), set(metadata.state_dict_metadata)]

    answers = {"open_stored": lambda path: Stored(path, metadata, common), "gather_from_all": needs_of_all}
    with StandIns() as stand_ins, tempfile.TemporaryDirectory() as folder:
        for module, values in ((stored, {"read_box": read_box, "find_blob": find_blob}), (fitting, answers)):
            for name, value in values.items():
                stand_ins.set(module, name, value)
        load_sharded(state, Path(folder), with_rng=False)


def _contents(state: TrainingState) -> tuple[Metadata, dict[str, Any]]:
    """Table of contents, and what all ranks share, of a checkpoint of this state; every tensor lies in one piece."""
    model = model_state(state.chunks)
    optimizer = optimizer_state(state.optimizer, model, is_loading=True)
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {
        sharded.key: _entry(sharded, sharded.data.dtype) for sharded in model.values()
    }
    wide = {run.sharded.key: run.values.dtype for run in optimizer.held}
    entries |= {key: _entry(each, wide.get(key, each.data.dtype)) for key, each in optimizer.shapes.items()}
    parts = {name: part.state_dict() for name, part in state.parts.items()}
    return Metadata(entries), {"optimizer": optimizer.common, "parts": parts}


def _entry(sharded: Sharded, dtype: torch.dtype) -> TensorStorageMetadata:
    shape = torch.Size(global_shape(sharded))
    whole = ChunkStorageMetadata(torch.Size([0] * len(shape)), shape)
    return TensorStorageMetadata(TensorProperties(dtype), shape, [whole])
