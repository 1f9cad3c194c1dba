"""What a training checkpoint holds, written and read with megatron-core's distributed checkpoints (`torch_dist`).

Tensors are stored under their global names and shapes, so a checkpoint opens under any tensor, pipeline and data
parallelism. Only the random states belong to one layout.
"""

from __future__ import annotations

import inspect
import os
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedStateDict
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_rb.checkpoint.storage.torch_dist import COMMON, COMMON_KEY
from megatron_rb.platform.base import Platform

RNG_KEY = "rng"
NOT_ASKED_FOR = (RNG_KEY, COMMON_KEY)
"""Keys that a checkpoint may have beyond what is restored: random states of another layout, and the content of
`common.pt` once more."""
LISTED_KEYS = 5
"""Keys named in an error before the rest is counted."""


class Chunk(Protocol):
    """What a model chunk must offer: its weights under their global names."""

    def sharded_state_dict(self) -> ShardedStateDict: ...


class Stateful(Protocol):
    """Anything with a small state that is equal on all ranks: schedule, loader, meters."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class TrainingState:
    """The living objects that a checkpoint is made of and restored into."""

    chunks: Sequence[torch.nn.Module]
    """Model chunks of this rank, in or out of DistributedDataParallel. The module inside has a `sharded_state_dict()`
    from global names to ShardedTensor (or factory) whose `data` is the parameter itself."""
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


def save_sharded(state: TrainingState, folder: Path, low_memory: bool, asynchronous: bool) -> AsyncRequest | None:
    """Write the state into the existing, empty `folder`; asynchronous = return the request that does the writing.

    `low_memory` gathers the optimizer state over gloo on one data-parallel rank instead of on all over the device.
    """
    with synchronized_parameters(state.chunks):
        content = _content(state, is_loading=False, low_memory=low_memory)
    content["parts"] = {name: part.state_dict() for name, part in state.parts.items()}
    content[RNG_KEY] = _rng_object(_rng_states(state.platform))
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
    return dist_checkpointing.save(
        content,
        str(folder),
        sharded_strategy=strategy,
        async_sharded_save=asynchronous,
        preprocess_common_before_consistancy_check=_common_to_compare,
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

    Raises:
        ValueError: the checkpoint lacks something that the model, optimizer or parts need, or has more than they take.
    """
    content = _content(state, is_loading=True, low_memory=True)
    if with_rng:
        content[RNG_KEY] = _rng_object({})
    loaded = _load_strictly(content, folder, ignored=NOT_ASKED_FOR)
    restore_model(state.chunks, loaded["model"])
    try:
        state.optimizer.load_state_dict(loaded["optimizer"])
    except KeyError as error:
        raise ValueError(
            f"the parameter groups of {folder} differ from those of this run ({error}): the learning-rate ratios must "
            "be those of the run that saved it; start a new run from its weights with checkpoint.init to change them"
        ) from error
    _load_parts(state.parts, loaded["parts"], folder)
    if with_rng:
        _restore_rng(loaded[RNG_KEY], state.platform)


def save_model_only(weights: ShardedStateDict, folder: Path) -> None:
    """Write weights under their global names, and nothing else, into the existing, empty `folder`."""
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
    dist_checkpointing.save({"model": weights}, str(folder), sharded_strategy=strategy, **_own_writers())


def load_model_only(chunks: Sequence[torch.nn.Module], folder: Path) -> None:
    """Restore the weights of a checkpoint and nothing else; raises ValueError when any is missing."""
    loaded = _load_strictly({"model": model_state(chunks)}, folder, ignored=(*NOT_ASKED_FOR, "optimizer."))
    restore_model(chunks, loaded["model"])


def model_state(chunks: Sequence[torch.nn.Module]) -> ShardedStateDict:
    """Sharded weights of all chunks of this rank under their global names."""
    merged: ShardedStateDict = {}
    for chunk in chunks:
        state = unwrapped(chunk).sharded_state_dict()
        twice = merged.keys() & state.keys()
        if twice:
            raise ValueError(f"two chunks of a rank hold the same parameter: {_listed(twice)}")
        merged.update(state)
    return merged


def restore_model(chunks: Sequence[torch.nn.Module], loaded: Mapping[str, torch.Tensor]) -> None:
    """Copy loaded tensors into the parameters and buffers of the chunks, in place."""
    for chunk in chunks:
        for name, sharded in unwrapped(chunk).sharded_state_dict().items():
            with torch.no_grad():
                sharded.data.copy_(loaded[name])


def unwrapped(chunk: torch.nn.Module) -> Chunk:
    """The module inside DistributedDataParallel."""
    return cast(Chunk, chunk.module if isinstance(chunk, DistributedDataParallel) else chunk)


def _content(state: TrainingState, is_loading: bool, low_memory: bool) -> ShardedStateDict:
    model = model_state(state.chunks)
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": low_memory,
        "chained_optim_avoid_prefix": True,
    }
    optimizer = state.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata)
    return {"model": model, "optimizer": optimizer}


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


def _load_strictly(content: ShardedStateDict, folder: Path, ignored: tuple[str, ...]) -> dict[str, Any]:
    """Load; keys the checkpoint lacks are an error, and those it has beyond unless they start with an ignored word."""
    try:
        # megatron-core calls missing what the checkpoint has and the request lacks, unexpected the reverse.
        loaded, beyond, lacking = dist_checkpointing.load(content, str(folder), strict=StrictHandling.RETURN_ALL)
    except CheckpointingException as error:
        raise ValueError(f"{folder} does not fit this run: {error}") from error
    beyond = {key for key in beyond if not key.startswith(ignored)}
    if lacking or beyond:
        optimizer_only = all(key.startswith("optimizer.") for key in {*lacking, *beyond})
        way_out = "; set optimizer.name, parallel.distributed_optimizer and model.dtype as in the run that saved it"
        hint = way_out if optimizer_only else ""
        raise ValueError(
            f"{folder} does not fit this run: it lacks {_listed(lacking)} and has beyond it {_listed(beyond)}; "
            f"nothing was restored{hint}"
        )
    return loaded


def _load_parts(parts: Mapping[str, Stateful], loaded: Mapping[str, Any], folder: Path) -> None:
    if parts.keys() != loaded.keys():
        raise ValueError(f"{folder} holds the states {_listed(loaded)}, this run needs {_listed(parts)}")
    for name, part in parts.items():
        part.load_state_dict(loaded[name])


def _listed(keys: Any) -> str:
    names = sorted(keys)
    if not names:
        return "nothing"
    more = f" and {len(names) - LISTED_KEYS} more" if len(names) > LISTED_KEYS else ""
    return ", ".join(names[:LISTED_KEYS]) + more


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


def _common_to_compare(common: dict[str, Any]) -> dict[str, Any]:
    """What all ranks must agree on: not the optimizer, whose tensors only one data-parallel rank may hold."""
    return {"parts": common["parts"]}
