"""The state of optimizers in checkpoints: tensors under the names of their parameters, and what all ranks share.

A data-parallel rank of megatron-core's distributed optimizer holds a run of elements of each parameter: it writes and
reads just that. Other optimizers hold all of it on every data-parallel rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import (
    dict_list_map_outplace,
    extract_matching_values,
    merge,
    nested_values,
)
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_rb.checkpoint.runs import TensorRun
from megatron_rb.parallel.sharding import Sharded

PREFIX = "optimizer."
TENSORS = ("param", "exp_avg", "exp_avg_sq")
"""Of the distributed optimizer, which is Adam: the fp32 parameter and its moments, each of the parameter's shape."""
FORMAT_KEY, FORMAT = "param_state_sharding_type", "fully_reshardable"
"""How megatron-core calls tensors that lie under the names and in the shapes of the parameters."""


@dataclass(frozen=True)
class OptimizerState:
    """The tensors of an optimizer that are live, under the names of a checkpoint."""

    shapes: Mapping[str, Sharded]
    """By key: the tensors of this rank and of those with the same weights."""
    held: tuple[TensorRun, ...]
    """Runs that no other rank with the same weights holds."""
    replicated: tuple[Sharded, ...]
    """Tensors that all of them hold."""
    common: dict[Any, Any]
    """What all ranks share: parameter groups and steps."""
    tree: ShardedStateDict
    """What megatron-core's other optimizers load: the replicated tensors in their places."""


def optimizer_state(optimizer: MegatronOptimizer, model: Mapping[str, Sharded], is_loading: bool) -> OptimizerState:
    """The state of this rank; `model`: its weights by name, whose `data` are the parameters."""
    parts = _parts(optimizer)
    if not all(isinstance(part, DistributedOptimizer) for part in parts):
        return _replicated_state(optimizer, model, is_loading)
    entries = {sharded.data: sharded for sharded in model.values()}
    shapes = {sharded.key: sharded for part in parts for sharded in _named_tensors(part, entries)}
    held = tuple(run for part in parts for run in _held_runs(part, entries))
    states = [part.state_dict() | {FORMAT_KEY: FORMAT} for part in parts]
    return OptimizerState(shapes, held, (), states[0] if len(states) == 1 else dict(enumerate(states)), {})


def restore_optimizer(optimizer: MegatronOptimizer, state: OptimizerState, common: dict[Any, Any]) -> None:
    """Take over what all ranks share from a checkpoint whose tensors have been read into those of `state`.

    Raises:
        KeyError: the parameter groups are others.
    """
    if state.tree:
        optimizer.load_state_dict(merge(common, dict_list_map_outplace(_live, state.tree)))
        return
    parts = _parts(optimizer)
    saved = [common] if len(parts) == 1 else [common[number] for number in range(len(parts))]
    for part, each in zip(parts, saved, strict=True):
        part.load_state_dict({key: value for key, value in each.items() if key not in (FORMAT_KEY, "param_state")})


def _parts(optimizer: MegatronOptimizer) -> list[Any]:
    """The optimizers that megatron-core has chained."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _named_tensors(part: DistributedOptimizer, entries: Mapping[torch.Tensor, Sharded]) -> Iterator[Sharded]:
    for buffer in part.buffers:
        for parameter in buffer.param_index_map:
            for name in TENSORS:
                yield _named(entries[parameter], name)


def _held_runs(part: DistributedOptimizer, entries: Mapping[torch.Tensor, Sharded]) -> Iterator[TensorRun]:
    for buffer in part.gbuf_ranges:
        for buckets in buffer.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    tensors = part._get_main_param_and_optimizer_states(parameter)
                    for name in TENSORS:
                        yield TensorRun(_named(entries[parameter], name), ranges["param"].start, tensors[name].detach())


def _named(parameter: Sharded, name: str) -> Sharded:
    return replace(parameter, key=f"{PREFIX}state.{name}.{parameter.key}")


def _replicated_state(optimizer: MegatronOptimizer, model: Mapping[str, Sharded], is_loading: bool) -> OptimizerState:
    tree = optimizer.sharded_state_dict(
        dict(model), is_loading=is_loading, metadata={"chained_optim_avoid_prefix": True}
    )
    live, common = extract_matching_values(tree, _is_live)
    tensors = tuple(value for value in nested_values(live) if not isinstance(value, LocalNonpersistentObject))
    return OptimizerState({tensor.key: tensor for tensor in tensors}, (), tensors, common, live)


def _is_live(value: Any) -> bool:
    return isinstance(value, ShardedTensor | ShardedTensorFactory | LocalNonpersistentObject)


def _live(value: Any) -> Any:
    return value.unwrap() if isinstance(value, LocalNonpersistentObject) else value.data
