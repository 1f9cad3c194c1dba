"""Runs of tensors: what one rank writes or reads of a local tensor, and the boxes of the stored one that it fills."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor

from megatron_rb.parallel.boxes import TensorBox, boxes_of_run, cut_evenly, place_of
from megatron_rb.parallel.mesh import Mesh
from megatron_rb.parallel.sharding import PlacedBox, Sharded, global_shape, placed_boxes


@dataclass(frozen=True)
class TensorRun:
    """Consecutive elements of a local tensor in row-major order."""

    sharded: Sharded
    """Key of the local tensor and its place in the stored one; its `data` has the local shape."""
    first: int
    """Number of the first element in the local tensor."""
    values: torch.Tensor
    """`[elements]`, in the memory of the model or optimizer."""


def is_written(sharded: Sharded) -> bool:
    """Whether this rank, or one with the same weights, writes a tensor: not a second copy of it on other ranks.

    Copies are those of tied embeddings, and of what every tensor-parallel rank holds.
    """
    copy, tp_replica, _ = sharded.replica_id
    return copy == 0 and tp_replica == 0


def pieces_of(run: TensorRun) -> list[ShardedTensor]:
    """The boxes of the stored tensor that a run fills, as views of its values; padding is in none."""
    shape = tuple(run.sharded.data.shape)
    pieces = []
    for box in boxes_of_run(shape, run.first, run.first + run.values.numel()):
        begin = place_of(box.start, shape) - run.first
        block = run.values[begin : begin + box.numel].view(box.shape)
        for part in placed_boxes(run.sharded):
            inside = box.overlap(part.local)
            if inside is not None:
                pieces.append(_piece(run.sharded, block[inside.seen_from(box.start).slices()], inside, part))
    return pieces


def _piece(sharded: Sharded, values: torch.Tensor, inside: TensorBox, part: PlacedBox) -> ShardedTensor:
    leading = len(part.offset) - len(inside.shape)
    values = values[(None,) * leading]
    shift = (*[0] * leading, *inside.seen_from(part.local.start).start)
    offset = tuple(a + b for a, b in zip(part.offset, shift, strict=True))
    # No grid: megatron-core's word for boxes of unequal size.
    return ShardedTensor(
        sharded.key, values, values.dtype, tuple(values.shape), global_shape(sharded), offset, axis_fragmentations=None
    )


def shared_runs(tensors: Sequence[Sharded], mesh: Mesh) -> list[tuple[int, TensorRun]]:
    """Tensors that data- and context-parallel ranks hold alike, cut into shares of equal bytes for each of these ranks.

    Returns:
        `(number of the rank among them, run)`, in the same order on all of them.
    """
    runs = []
    for cut in cut_evenly([sharded.data.nbytes for sharded in tensors], len(_ranks(mesh))):
        sharded = tensors[cut.tensor]
        first, stop = (byte // sharded.data.itemsize for byte in (cut.first, cut.stop))
        if first < stop:
            runs.append((cut.part, TensorRun(sharded, first, sharded.data.detach().view(-1)[first:stop])))
    return runs


def runs_of_rank(runs: Iterable[tuple[int, TensorRun]], mesh: Mesh) -> list[TensorRun]:
    """Those of `shared_runs` that are this rank's."""
    mine = holder_number(mesh)
    return [run for part, run in runs if part == mine]


def send_to_all(runs: Iterable[tuple[int, TensorRun]], mesh: Mesh) -> None:
    """Give `shared_runs`, each filled on its rank, to the others that hold the same."""
    ranks = _ranks(mesh)
    if len(ranks) == 1:
        return
    for part, run in runs:
        dist.broadcast(run.values, src=ranks[part], group=mesh.dp_cp_group)


def holder_number(mesh: Mesh) -> int:
    """Number of this rank among those that hold the same weights."""
    return _ranks(mesh).index(mesh.rank)


def _ranks(mesh: Mesh) -> tuple[int, ...]:
    return tuple(mesh.grid.group(mesh.rank, "cp", "dp")) if mesh.groups else (mesh.rank,)


def clear_padding(run: TensorRun) -> None:
    """Set to zero a run of a tensor that has padding, which no checkpoint holds."""
    if sum(part.local.numel for part in placed_boxes(run.sharded)) < math.prod(run.sharded.data.shape):
        run.values.zero_()
