"""What a training checkpoint holds, written and read with megatron-core's distributed checkpoints (`torch_dist`).

Tensors are stored under their global names and shapes, so a checkpoint opens under any tensor, pipeline and data
parallelism. Only the random states belong to one layout.
"""

from __future__ import annotations

import inspect
import logging
import os
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import diff
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedStateDict
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_rb.checkpoint.fitting import listed, open_fitting, read_together
from megatron_rb.checkpoint.optimizer_state import PREFIX, optimizer_state, restore_optimizer
from megatron_rb.checkpoint.runs import TensorRun, is_written, pieces_of, runs_of_rank, shared_runs
from megatron_rb.checkpoint.storage.torch_dist import COMMON, COMMON_KEY
from megatron_rb.parallel.mesh import Mesh
from megatron_rb.parallel.sharding import Sharded
from megatron_rb.platform.base import Platform

logger = logging.getLogger(__name__)

RNG_KEY = "rng"
NOT_ASKED_FOR = (RNG_KEY, COMMON_KEY)
"""Keys that a checkpoint may have beyond what is restored: random states of another layout, and the content of
`common.pt` once more."""


class Chunk(Protocol):
    """What a model chunk must offer: its weights under their global names, and its mesh."""

    mesh: Mesh

    def sharded_state_dict(self) -> dict[str, Sharded]: ...


class Stateful(Protocol):
    """Anything with a small state that is equal on all ranks: schedule, loader, meters."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class TrainingState:
    """The living objects that a checkpoint is made of and restored into."""

    chunks: Sequence[torch.nn.Module]
    """Model chunks of this rank, in or out of DistributedDataParallel. The module inside has a `sharded_state_dict()`
    from global names to ShardedTensor (or factory) whose `data` is the parameter itself, and a `mesh`."""
    optimizer: MegatronOptimizer
    parts: Mapping[str, Stateful]
    """Further state by name, e.g. `schedule` and `loader`."""
    model: Mapping[str, Any]
    """What identifies the model (sizes, kind): JSON-able; a checkpoint of another model is refused."""
    layout: Mapping[str, Any]
    """What the random states depend on (degrees, pipeline layout): JSON-able."""
    platform: Platform
    reseed: Callable[[int], None]
    """Seeds all generators for the step given, when a checkpoint comes from another layout."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """Further words of the manifest, which a checkpoint is not judged by: JSON-able."""


def save_sharded(state: TrainingState, folder: Path, asynchronous: bool) -> AsyncRequest | None:
    """Write the state into the existing, empty `folder`; asynchronous = return the request that does the writing.

    Every rank writes what it alone holds of the optimizer, and its share of what data-parallel ranks hold alike: no
    tensor travels between ranks.
    """
    with synchronized_parameters(state.chunks):
        model = model_state(state.chunks)
        optimizer = optimizer_state(state.optimizer, model, is_loading=False)
    shared = [tensor for tensor in (*model.values(), *optimizer.replicated) if is_written(tensor)]
    held = [run for run in optimizer.held if is_written(run.sharded)]
    parts = {name: part.state_dict() for name, part in state.parts.items()}
    _compare_with_rank_zero(parts)
    content: dict[str, Any] = {
        "optimizer": optimizer.common,
        "parts": parts,
        RNG_KEY: _rng_object(_rng_states(state.platform)),
    }
    mesh = mesh_of(state.chunks)
    content |= _pieces([*runs_of_rank(shared_runs(shared, mesh), mesh), *held])
    return dist_checkpointing.save(
        content,
        str(folder),
        sharded_strategy=_strategy(),
        # It would give every rank the descriptions of all pieces of all ranks, and looks at grids alone; torch's plan,
        # which rank 0 makes of the same descriptions, proves that pieces cover every tensor once.
        validate_access_integrity=False,
        async_sharded_save=asynchronous,
        **_own_writers(),
    )


def complete_common(folder: Path) -> None:
    """Write `common.pt` where megatron-core has not: from 0.19 on it keeps the content elsewhere, older releases do not
    look there, and all of them read the file. Called by one rank when everything else is written."""
    if not (folder / COMMON).exists():
        content = dist_checkpointing.load_common_state_dict(str(folder))
        with open(folder / COMMON, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())


def load_sharded(state: TrainingState, folder: Path, with_rng: bool) -> None:
    """Restore everything in place; `with_rng` also the random states (the world must be the one that saved them).

    Every rank reads what it alone holds of the optimizer; what data-parallel ranks hold alike is read once among them.

    Raises:
        ValueError: the checkpoint lacks something that the model, optimizer or parts need, or has more than they take.
    """
    model = model_state(state.chunks)
    optimizer = optimizer_state(state.optimizer, model, is_loading=True)
    wanted = {tensor.key: tensor for tensor in model.values()} | dict(optimizer.shapes)
    rng = _rng_object({}).unique_key if with_rng else None
    mesh = mesh_of(state.chunks)
    stored = open_fitting(folder, wanted, {rng} if rng else set(), NOT_ASKED_FOR, mesh)
    _check_parts(state.parts, stored.common["parts"], folder)
    states = read_together(stored, [*model.values(), *optimizer.replicated], optimizer.held, rng, mesh)
    try:
        restore_optimizer(state.optimizer, optimizer, stored.common["optimizer"])
    except KeyError as error:
        raise ValueError(
            f"the parameter groups of {folder} differ from those of this run ({error}): the learning-rate ratios must "
            "be those of the run that saved it; start a new run from its weights with checkpoint.init to change them"
        ) from error
    for name, part in state.parts.items():
        part.load_state_dict(stored.common["parts"][name])
    if with_rng:
        _restore_rng(states, state.platform)


def save_model_only(weights: ShardedStateDict, folder: Path) -> None:
    """Write weights under their global names, and nothing else, into the existing, empty `folder`."""
    dist_checkpointing.save({"model": weights}, str(folder), sharded_strategy=_strategy(), **_own_writers())


def load_model_only(chunks: Sequence[torch.nn.Module], folder: Path) -> None:
    """Restore the weights of a checkpoint and nothing else, each read once by the ranks that hold the same.

    Raises:
        ValueError: any is missing.
    """
    model, mesh = model_state(chunks), mesh_of(chunks)
    wanted = {tensor.key: tensor for tensor in model.values()}
    stored = open_fitting(folder, wanted, set(), (*NOT_ASKED_FOR, PREFIX), mesh)
    read_together(stored, list(model.values()), (), None, mesh)


def model_state(chunks: Sequence[torch.nn.Module]) -> dict[str, Sharded]:
    """Sharded weights of all chunks of this rank under their global names."""
    merged: dict[str, Sharded] = {}
    for chunk in chunks:
        state = unwrapped(chunk).sharded_state_dict()
        twice = merged.keys() & state.keys()
        if twice:
            raise ValueError(f"two chunks of a rank hold the same parameter: {listed(twice)}")
        merged.update(state)
    return merged


def unwrapped(chunk: torch.nn.Module) -> Chunk:
    """The module inside DistributedDataParallel."""
    return cast(Chunk, chunk.module if isinstance(chunk, DistributedDataParallel) else chunk)


def mesh_of(chunks: Sequence[torch.nn.Module]) -> Mesh:
    """The mesh that the chunks were built for."""
    return unwrapped(chunks[0]).mesh


def _strategy() -> TorchDistSaveShardedStrategy:
    return TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)


def _pieces(runs: Iterable[TensorRun]) -> dict[str, Any]:
    """What runs write, in the form that megatron-core saves; it keeps the names of empty containers."""
    pieces = dict(enumerate(piece for run in runs for piece in pieces_of(run)))
    return {"pieces": pieces} if pieces else {}


def _own_writers() -> dict[str, str]:
    """Options of `dist_checkpointing.save` for megatron-core's own writers, which the manager's queue can start.

    Where it can choose, it would take those of nvidia-resiliency-ext.
    """
    can_choose = "async_strategy" in inspect.signature(dist_checkpointing.save).parameters
    return {"async_strategy": "mcore"} if can_choose else {}


@contextmanager
def synchronized_parameters(chunks: Sequence[torch.nn.Module]):
    """With overlapped gathering a rank's copy of the others' parameters is one step old until the next forward pass."""
    with ExitStack() as stack:
        for chunk in chunks:
            if isinstance(chunk, DistributedDataParallel) and getattr(chunk, "remove_forward_pre_hook_handles", None):
                chunk.disable_forward_pre_hook(param_sync=True)
                stack.callback(chunk.enable_forward_pre_hook)
        yield


def _check_parts(parts: Mapping[str, Stateful], loaded: Mapping[str, Any], folder: Path) -> None:
    if parts.keys() != loaded.keys():
        raise ValueError(f"{folder} holds the states {listed(loaded)}, this run needs {listed(parts)}")


def _rng_object(states: dict[str, Any]) -> ShardedObject:
    return ShardedObject(RNG_KEY, states, (dist.get_world_size(),), (dist.get_rank(),), replica_id=0)


def _rng_states(platform: Platform) -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "device": platform.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }


def _restore_rng(states: Mapping[str, Any], platform: Platform) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    platform.set_rng_state(states["device"])
    get_cuda_rng_tracker().set_states(states["tracker"])


def _compare_with_rank_zero(parts: dict[str, Any]) -> None:
    """Warn when the small states, which rank 0 alone writes, are others here."""
    told = [parts]
    dist.broadcast_object_list(told, src=0, device=torch.device("cpu"))
    only_there, only_here, other = diff(told[0], parts)
    if only_there or only_here or other:
        names = sorted({".".join(map(str, path)) for path in (*only_there, *only_here, *(each[0] for each in other))})
        logger.warning("rank %d has another state than rank 0, whose is saved: %s", dist.get_rank(), ", ".join(names))
