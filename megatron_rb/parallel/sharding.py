"""How one parameter is cut over the tensor-parallel group: the same rule for loading, saving and exporting.

A parameter's *full* tensor is its global, unpadded value. `ShardSpec` says along which dimension ranks share it. Fused
parameters (`[gate; up]`) have `stride` parts that are each cut. A size that the tensor-parallel degree does not divide
is padded with zeros on the last ranks; the padding exists in memory only and never reaches a checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

from megatron_rb.parallel.boxes import TensorBox


@dataclass(frozen=True)
class ShardSpec:
    """Placement of one parameter over tensor-parallel ranks."""

    full_shape: tuple[int, ...]
    """Global shape without padding."""
    dim: int | None = None
    """Dimension that is cut; None = every rank holds the whole tensor."""
    stride: int = 1
    """Number of equal parts along `dim` that are cut one by one (2 for a fused gate and up projection)."""

    def part_size(self) -> int:
        """Global, unpadded length of one part along `dim`."""
        assert self.dim is not None
        return self.full_shape[self.dim] // self.stride

    def rank_size(self, tp_size: int) -> int:
        """Length of one part on one rank, padding included."""
        return -(-self.part_size() // tp_size)

    def rank_range(self, tp_rank: int, tp_size: int) -> tuple[int, int]:
        """Global start and stop of the real (unpadded) values of one part on a rank."""
        size, width = self.part_size(), self.rank_size(tp_size)
        return min(tp_rank * width, size), min((tp_rank + 1) * width, size)

    def local_shape(self, tp_size: int) -> tuple[int, ...]:
        if self.dim is None:
            return self.full_shape
        shape = list(self.full_shape)
        shape[self.dim] = self.stride * self.rank_size(tp_size)
        return tuple(shape)


@dataclass(frozen=True)
class PlacedBox:
    """Real (unpadded) values of a local tensor and where they lie in the stored one."""

    local: TensorBox
    offset: tuple[int, ...]
    """Index of the first value in the stored tensor, which may have a leading dimension more."""


@dataclass
class PartsFactory(ShardedTensorFactory):
    """A local tensor that is no even slice of the stored one: several parts, or padding behind them."""

    parts: tuple[PlacedBox, ...] = ()
    stored_shape: tuple[int, ...] = ()


Sharded: TypeAlias = ShardedTensor | PartsFactory
"""What `sharded_tensor` makes."""


def placed_boxes(sharded: Sharded) -> tuple[PlacedBox, ...]:
    """The values of a local tensor as boxes of the stored one; none where it holds padding only."""
    if isinstance(sharded, PartsFactory):
        return sharded.parts
    return (PlacedBox(TensorBox((0,) * len(sharded.local_shape), sharded.local_shape), sharded.global_offset),)


def global_shape(sharded: Sharded) -> tuple[int, ...]:
    """Of the stored tensor."""
    return sharded.stored_shape if isinstance(sharded, PartsFactory) else sharded.global_shape


def set_shard(parameter: torch.Tensor, spec: ShardSpec) -> None:
    """Write the placement of a parameter on the parameter."""
    parameter.shard = spec  # type: ignore[attr-defined]


def shard_of(parameter: torch.Tensor) -> ShardSpec:
    """The placement that `set_shard` wrote."""
    return parameter.shard  # type: ignore[attr-defined]


def full_to_local(full: torch.Tensor, spec: ShardSpec, tp_rank: int, tp_size: int) -> torch.Tensor:
    """The slice of a full tensor that a rank holds, zero-padded where the degree does not divide the size."""
    if tuple(full.shape) != spec.full_shape:
        raise ValueError(f"a tensor of shape {tuple(full.shape)} was given where the model has {spec.full_shape}")
    if spec.dim is None:
        return full
    start, stop = spec.rank_range(tp_rank, tp_size)
    pieces = []
    for part in full.split(spec.part_size(), dim=spec.dim):
        piece = part.narrow(spec.dim, start, stop - start)
        pieces.append(_pad_to(piece, spec.dim, spec.rank_size(tp_size)))
    return torch.cat(pieces, dim=spec.dim) if len(pieces) > 1 else pieces[0].contiguous()


def local_to_full(shards: list[torch.Tensor], spec: ShardSpec) -> torch.Tensor:
    """Put the shards of all tensor-parallel ranks together again; the inverse of `full_to_local`."""
    if spec.dim is None:
        return shards[0]
    parts = []
    for index in range(spec.stride):
        pieces = [shard.chunk(spec.stride, dim=spec.dim)[index] for shard in shards]
        parts.append(torch.cat(pieces, dim=spec.dim).narrow(spec.dim, 0, spec.part_size()))
    return torch.cat(parts, dim=spec.dim)


def sharded_tensor(
    key: str, local: torch.Tensor, spec: ShardSpec, tp_rank: int, tp_size: int, dp_rank: int, copy: int = 0
) -> Sharded:
    """Describe a local parameter to megatron-core's distributed checkpoints.

    Args:
        copy: 0 for the parameter itself, 1 for a second holder of the same key (the head of tied embeddings).
    """
    # A rank that holds padding only stands for the first row a second time: it must name the key, but writes nothing.
    tp_replica = tp_rank if spec.dim is None else int(_holds_padding_only(spec, tp_rank, tp_size))
    replica_id = (copy, tp_replica, dp_rank)
    if spec.dim is None or (spec.stride == 1 and spec.part_size() % tp_size == 0):
        offsets = [] if spec.dim is None else [(spec.dim, tp_rank, tp_size)]
        return ShardedTensor.from_rank_offsets(key, local, *offsets, replica_id=replica_id)
    build = partial(_build_parts, spec=spec, tp_rank=tp_rank, tp_size=tp_size)
    merge = partial(_merge_parts, spec=spec, tp_rank=tp_rank, tp_size=tp_size)
    parts = _placed_parts(spec, tp_rank, tp_size)
    return PartsFactory(key, local, build, merge, replica_id, parts=parts, stored_shape=stored_shape(spec))


def stored_shape(spec: ShardSpec) -> tuple[int, ...]:
    """Global shape in a checkpoint, the same for every degree: fused parts lie on a leading dimension."""
    if spec.stride == 1:
        return spec.full_shape
    assert spec.dim is not None
    shape = list(spec.full_shape)
    shape[spec.dim] = spec.part_size()
    return (spec.stride, *shape)


def stored_to_full(stored: torch.Tensor, spec: ShardSpec) -> torch.Tensor:
    """The full tensor from its form in a checkpoint."""
    if spec.stride == 1:
        return stored
    assert spec.dim is not None
    return torch.cat(list(stored), dim=spec.dim)


def _holds_padding_only(spec: ShardSpec, tp_rank: int, tp_size: int) -> bool:
    start, stop = spec.rank_range(tp_rank, tp_size)
    return start == stop


def _placed_parts(spec: ShardSpec, tp_rank: int, tp_size: int) -> tuple[PlacedBox, ...]:
    assert spec.dim is not None
    start, stop = spec.rank_range(tp_rank, tp_size)
    shape = list(spec.full_shape)
    shape[spec.dim] = stop - start
    parts = []
    for index in range(spec.stride if start < stop else 0):
        low, offset = [0] * len(shape), [0] * len(shape)
        low[spec.dim], offset[spec.dim] = index * spec.rank_size(tp_size), start
        leading = [index] if spec.stride > 1 else []
        parts.append(PlacedBox(TensorBox(tuple(low), tuple(shape)), (*leading, *offset)))
    return tuple(parts)


def _build_parts(key, local, replica_id, flattened_range, *, spec: ShardSpec, tp_rank: int, tp_size: int):
    assert flattened_range is None and spec.dim is not None
    start, stop = (0, 1) if _holds_padding_only(spec, tp_rank, tp_size) else spec.rank_range(tp_rank, tp_size)
    shape = stored_shape(spec)
    leading = len(shape) - len(spec.full_shape)
    even = spec.part_size() % tp_size == 0
    fragments = [spec.stride] * leading + [1] * len(spec.full_shape)
    fragments[leading + spec.dim] = tp_size
    parts = []
    for index, part in enumerate(local.chunk(spec.stride, dim=spec.dim)):
        data = part.narrow(spec.dim, 0, stop - start)
        data = (data.unsqueeze(0) if leading else data).contiguous()
        offset = [index] * leading + [0] * len(spec.full_shape)
        offset[leading + spec.dim] = start
        grid = tuple(fragments) if even else None  # megatron-core's word for cuts of unequal size
        parts.append(ShardedTensor(key, data, data.dtype, tuple(data.shape), shape, tuple(offset), grid, replica_id))
    return parts


def _merge_parts(parts: list[torch.Tensor], *, spec: ShardSpec, tp_rank: int, tp_size: int) -> torch.Tensor:
    assert spec.dim is not None
    if _holds_padding_only(spec, tp_rank, tp_size):
        return parts[0].new_zeros(spec.local_shape(tp_size))
    values = [part.squeeze(0) for part in parts] if spec.stride > 1 else parts
    return torch.cat([_pad_to(value, spec.dim, spec.rank_size(tp_size)) for value in values], dim=spec.dim)


def _pad_to(tensor: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    missing = size - tensor.shape[dim]
    if missing == 0:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=dim)


def with_shape(spec: ShardSpec, full_shape: tuple[int, ...]) -> ShardSpec:
    """The same cut for another tensor of the same family (a bias beside its weight)."""
    return replace(spec, full_shape=full_shape)
