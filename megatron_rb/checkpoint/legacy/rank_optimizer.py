"""Which part of a rank's optimizer state belongs to which parameter, proven by the weights it was rounded to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch

from megatron_rb.checkpoint.legacy.buffers import Slot, bucket_sizes, buffer_layouts
from megatron_rb.checkpoint.legacy.layers import Site
from megatron_rb.checkpoint.legacy.names import PROJECTION, TEXT, VISION
from megatron_rb.checkpoint.legacy.reading import Reading
from megatron_rb.checkpoint.legacy.tree import RankCheckpoint
from megatron_rb.checkpoint.storage.mosaic import run_of
from megatron_rb.checkpoint.storage.tensors import FilePool, StoredTensor

MOMENTS = ("param", "exp_avg", "exp_avg_sq")
SAMPLE_BYTES = 64 << 10
"""Bytes at either end of a parameter that are compared with the rounded fp32 value."""
_MAX_GROUPS = 6
_EMBEDDINGS = (f"{TEXT}embedding.", f"{TEXT}output_layer.")

Moments = dict[str, StoredTensor]
"""`param`, `exp_avg` and `exp_avg_sq` of one parameter, fp32, in the shape that the rank holds."""
Mapped = dict[str, Moments]
"""By native name."""


class Unmappable(Exception):
    """An optimizer state of which it is not certain what belongs where."""


@dataclass(frozen=True)
class Local:
    """One parameter as a rank holds it."""

    site: Site
    weight: StoredTensor

    @property
    def decays(self) -> bool:
        """megatron-core's rule for weight decay."""
        return len(self.weight.shape) != 1 and not self.site.key.endswith(".bias")


_TRAINED: dict[str, Callable[[str], bool]] = {
    "everything": lambda key: True,
    "all but the vision tower": lambda key: not key.startswith(VISION),
    "all but the vision layers": lambda key: not key.startswith(VISION) or key.startswith(PROJECTION),
    "the vision tower": lambda key: key.startswith(VISION),
    "the projection": lambda key: key.startswith(PROJECTION),
}
"""What may have been trained; frozen parameters have no optimizer state."""
_GROUPINGS: tuple[Callable[[Local], Any], ...] = (
    lambda local: (local.decays,),
    lambda local: (local.decays, local.site.key.startswith(VISION)),
    lambda local: (local.decays, local.site.key.startswith(PROJECTION)),
    lambda local: (local.decays, local.site.key.startswith(_EMBEDDINGS)),
    lambda local: (local.decays, local.site.key.startswith(VISION), local.site.key.startswith(_EMBEDDINGS)),
    lambda local: (),
)
"""How parameters may have been grouped: by weight decay, and by learning rates of their own."""


def _trained_sets(rank: RankCheckpoint, sites: Sequence[Site]) -> list[list[Local]]:
    """Different sets of parameters that may have been trained on a rank, in the order of its model."""
    everything = [Local(site, rank.chunks[site.chunk][site.key]) for site in sites if site.pp_rank == rank.pp_rank]
    sets: list[list[Local]] = []
    for kept in _TRAINED.values():
        trained = [local for local in everything if kept(local.site.key)]
        if trained not in sets:
            sets.append(trained)
    return sets


def map_plain(reading: Reading, rank: RankCheckpoint, state: Mapping[str, Any]) -> Mapped:
    """The layout without the distributed optimizer: state by number, numbered group by group.

    Raises:
        Unmappable: no grouping, or more than one, fits shapes and weights.
    """
    inner = state.get("optimizer", state)
    mains = state.get("fp32_from_fp16_params", state.get("fp32_from_fp16"))
    groups = _filled_groups(inner, mains)
    found: list[dict[str, tuple[int, int]]] = []
    results: list[Mapped] = []
    for trained in _trained_sets(rank, reading.sites):
        for grouping in _GROUPINGS:
            for assigned in _assignments(trained, grouping, groups):
                identity = {local.site.native: place for local, place in assigned}
                if identity not in found and (mapped := _proven(assigned, groups, reading.pool)) is not None:
                    found.append(identity)
                    results.append(mapped)
    return _only(results, f"{rank.file.path}: its parameter groups of {[len(g.moments) for g in groups]} parameters")


def map_distributed(reading: Reading, rank: RankCheckpoint, buffers: Any) -> Mapped:
    """The distributed optimizer's layout: per chunk and type one flat buffer of each kind.

    Raises:
        Unmappable: the buffers are of another version, or their lengths and values do not fit the weights.
    """
    if isinstance(buffers, list) and len(buffers) == 1:
        buffers = buffers[0]
    if not isinstance(buffers, Mapping) or buffers.get("buckets_coalesced") is not True:
        raise Unmappable(
            "distrib_optim.pt holds one tensor per bucket or several optimizers, as early or overlapping versions of "
            "the distributed optimizer write; only joined buckets of one optimizer are read"
        )
    worlds = _worlds(buffers)
    shared = reading.tied and reading.tree.pp_size > 1
    results = []
    for trained in _trained_sets(rank, reading.sites):
        members = _buffer_members(trained)
        if len(members) == len(worlds):
            parts = [_map_buffer(rank, *pair, shared, reading.pool) for pair in zip(members, worlds, strict=True)]
            if all(part is not None for part in parts):
                results.append({name: moments for part in parts if part for name, moments in part.items()})
    return _only(results, f"{rank.file.path.parent}: its {len(worlds)} optimizer buffers")


def _only(results: Sequence[Mapped], what: str) -> Mapped:
    if not results:
        raise Unmappable(f"{what} fit no known order of the parameters of that rank, or not the weights")
    if len(results) > 1:
        raise Unmappable(f"{what} fit {len(results)} orders of the parameters of that rank")
    return results[0]


# Plain layout


@dataclass(frozen=True)
class _Group:
    decays: bool | None
    """None: the group does not tell."""
    moments: list[dict[str, StoredTensor | None]]
    """In the group's order; `param` is None where the weight itself is fp32."""
    mains: list[StoredTensor] | None
    """fp32 copies of the parameters that are not fp32 themselves."""


def _filled_groups(inner: Mapping[str, Any], mains: Any) -> list[_Group]:
    groups = []
    states = inner.get("state") or {}
    for number, group in enumerate(inner["param_groups"]):
        if not group["params"]:
            continue
        moments = []
        for index in group["params"]:
            state = states.get(index) or {}
            if not all(isinstance(state.get(name), StoredTensor) for name in MOMENTS[1:]):
                raise Unmappable(f"parameter {index} has no Adam moments; it is of another optimizer, or made no step")
            if any(state[name].dtype != torch.float32 for name in MOMENTS[1:]):
                raise Unmappable(
                    f"the moments of parameter {index} are {state['exp_avg'].dtype} (a precision-aware "
                    "optimizer); only "
                    "fp32 is read"
                )
            moments.append({name: state[name] for name in MOMENTS[1:]})
        decays = bool(group["wd_mult"]) if "wd_mult" in group else None
        groups.append(_Group(decays, moments, list(mains[number]) if mains is not None else None))
    return groups


def _assignments(
    trained: Sequence[Local], grouping: Callable[[Local], Any], groups: Sequence[_Group]
) -> Iterator[list[tuple[Local, tuple[int, int]]]]:
    """Ways to give each block of parameters a group with the same shapes: `(parameter, (group, number in it))`."""
    blocks: dict[Any, list[Local]] = {}
    for local in trained:
        blocks.setdefault(grouping(local), []).append(local)
    if len(blocks) != len(groups) or len(groups) > _MAX_GROUPS:
        return
    for order in permutations(range(len(groups))):
        pairs = list(zip(blocks.values(), order, strict=True))
        if all(_fits(block, groups[number]) for block, number in pairs):
            yield [(local, (number, index)) for block, number in pairs for index, local in enumerate(block)]


def _fits(block: Sequence[Local], group: _Group) -> bool:
    shapes = [local.weight.shape for local in block]
    if shapes != [moments["exp_avg"].shape for moments in group.moments if moments["exp_avg"] is not None]:
        return False
    return group.decays is None or all(local.decays == group.decays for local in block)


def _proven(
    assigned: Sequence[tuple[Local, tuple[int, int]]], groups: Sequence[_Group], pool: FilePool
) -> Mapped | None:
    """The moments by name, or None when a rounded fp32 value is not the weight."""
    mapped: Mapped = {}
    mains = {number: iter(group.mains) for number, group in enumerate(groups) if group.mains is not None}
    for local, (number, index) in sorted(assigned, key=lambda pair: pair[1]):
        own_main = number in mains and local.weight.dtype != torch.float32
        main = next(mains[number], None) if own_main else local.weight
        if not isinstance(main, StoredTensor) or main.shape != local.weight.shape or main.dtype != torch.float32:
            return None
        if own_main and not _rounds_to(pool, main, local.weight):
            return None
        moments = {name: tensor for name, tensor in groups[number].moments[index].items() if tensor is not None}
        mapped[local.site.native] = {"param": main} | moments
    return None if any(next(rest, None) is not None for rest in mains.values()) else mapped


# Distributed layout


def _worlds(buffers: Mapping[Any, Any]) -> list[Mapping[str, Any]]:
    """The buffers in their order."""
    numbers = sorted(key for key in buffers if isinstance(key, int))
    worlds = []
    for number in numbers:
        kinds = buffers[number]
        if not isinstance(kinds, Mapping) or len(kinds) != 1:
            raise Unmappable(f"distrib_optim.pt holds several types in buffer {number}, which no known version writes")
        (world,) = kinds.values()
        if not all(isinstance(world.get(name), StoredTensor) for name in MOMENTS):
            raise Unmappable(f"distrib_optim.pt holds no {', '.join(MOMENTS)} in buffer {number}")
        if any(len(world[name].shape) != 1 or world[name].dtype != torch.float32 for name in MOMENTS):
            raise Unmappable(f"buffer {number} of distrib_optim.pt is not flat fp32")
        worlds.append(world)
    return worlds


def _buffer_members(trained: Sequence[Local]) -> list[list[Local]]:
    """Parameters of each buffer: chunk by chunk, in each one buffer per type in the order of appearance."""
    members: dict[tuple[int, torch.dtype], list[Local]] = {}
    for local in trained:
        members.setdefault((local.site.chunk, local.weight.dtype), []).append(local)
    return [members[key] for key in sorted(members, key=lambda key: (key[0], list(members).index(key)))]


def _map_buffer(
    rank: RankCheckpoint, members: Sequence[Local], world: Mapping[str, Any], shared: bool, pool: FilePool
) -> Mapped | None:
    slots = [
        Slot(
            _numel(local.weight),
            shared and local.site.key.startswith(_EMBEDDINGS) and local.site.parameter.layer is None,
        )
        for local in members
    ]
    length = world["param"].shape[0]
    sizes = bucket_sizes(rank.args, sum(slot.num_elements for slot in slots), rank.pp_rank, members[0].site.chunk)
    fitting = []
    for starts, total in buffer_layouts(slots, sizes):
        if total == length == world.get("numel_unpadded", length) and all(
            world[name].shape[0] == length for name in MOMENTS
        ):
            mapped = {
                local.site.native: {name: run_of(world[name], start, local.weight.shape) for name in MOMENTS}
                for local, start in zip(members, starts, strict=True)
            }
            if all(_rounds_to(pool, mapped[local.site.native]["param"], local.weight) for local in members):
                fitting.append(mapped)
    return fitting[0] if len(fitting) == 1 else None


def _numel(tensor: StoredTensor) -> int:
    return tensor.num_bytes // tensor.dtype.itemsize


def _rounds_to(pool: FilePool, main: StoredTensor, weight: StoredTensor) -> bool:
    """Whether the fp32 values at both ends of a parameter, rounded to its type, are the weights."""
    if not _numel(weight):
        return True
    count = min(weight.num_rows, max(1, SAMPLE_BYTES // max(main.row_bytes, 1)))
    for start in {0, weight.num_rows - count}:
        exact, rounded = (_some_rows(pool, tensor, start, count) for tensor in (main, weight))
        exact = exact.to(rounded.dtype)
        if not bool(((exact == rounded) | (exact.isnan() & rounded.isnan())).all()):
            return False
    return True


def _some_rows(pool: FilePool, tensor: StoredTensor, start: int, count: int) -> torch.Tensor:
    data = bytearray(count * tensor.row_bytes)
    pool.read_rows(tensor, start, count, memoryview(data))
    return torch.frombuffer(data, dtype=tensor.dtype)
