"""Hooks on the blocks of a rank that keep what passes the points, forward and backward, for one step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from megatron_rb.capture.columns import LocalColumns
from megatron_rb.capture.files import RankFile
from megatron_rb.capture.points import Columns, Point, Rows, points_of
from megatron_rb.capture.samples import Pick
from megatron_rb.models.inputs import MicroBatch
from megatron_rb.models.stage import RoboBrainStage
from megatron_rb.parallel.mesh import Mesh
from megatron_rb.parallel.sharding import shard_of


@dataclass
class _Progress:
    """Where a stage is in the step."""

    started: int = 0
    """Micro-batches whose forward pass has begun; they run in order on every stage."""
    running: bool = False
    """False outside the first forward pass: in the backward pass recomputed blocks run a second time."""


@dataclass(frozen=True)
class _Watched:
    """A point of a block on this rank."""

    block: str
    point: Point
    columns: LocalColumns
    grads: bool
    """Whether the gradient here is whole, not a part of a sum."""


class Recorder:
    """Keeps rows of the chosen samples until `stop`.

    Args:
        picks: by number of the micro-batch.
    """

    def __init__(
        self,
        stages: Sequence[RoboBrainStage],
        batches: Sequence[MicroBatch],
        picks: Mapping[int, list[Pick]],
        file: RankFile,
        mesh: Mesh,
    ) -> None:
        self.batches, self.picks, self.file, self.mesh = batches, picks, file, mesh
        self._handles: list[Any] = []
        self._index: dict[tuple, tuple[np.ndarray, torch.Tensor]] = {}
        for stage in stages:
            self._watch(stage)

    def stop(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _watch(self, stage: RoboBrainStage) -> None:
        progress = _Progress()
        unit = stage.shape.vision.merge_unit

        def begin(_module, args) -> None:
            progress.running = True
            progress.started += 1
            self._keep_angles(stage, args[0], progress.started - 1)

        def end(*_: object) -> None:
            progress.running = False

        self._handles += [stage.register_forward_pre_hook(begin), stage.register_forward_hook(end)]
        for name, block in blocks_of(stage):
            # Under sequence parallelism each rank's gradient of the head's norm is a part of a sum.
            grads = name != "language.head" or stage.rows_split_over == 1
            for point in points_of(name):
                module = block.get_submodule(point.module)
                watched = _Watched(name, point, _columns_of(point, module, self.mesh), grads)
                keep = partial(self._keep, progress, watched, unit)
                self._handles.append(_hook(module, point, keep))

    def _keep(self, progress: _Progress, watched: _Watched, unit: int, tensor: torch.Tensor) -> None:
        number = progress.started - 1
        picks = self.picks.get(number)
        if not progress.running or not picks:
            return
        total = self._total_rows(watched.point.rows, number, unit)
        for pick in picks:
            self._write("value", watched, total, pick, tensor.detach())
        if watched.grads and tensor.requires_grad:
            plain = replace(watched, point=replace(watched.point, context=False))
            tensor.register_hook(partial(self._keep_grad, plain, total, picks))

    def _keep_grad(self, watched: _Watched, total: int, picks: list[Pick], grad: torch.Tensor) -> None:
        for pick in picks:
            self._write("grad", watched, total, pick, grad.detach())

    def _write(self, what: str, watched: _Watched, total: int, pick: Pick, tensor: torch.Tensor) -> None:
        point, columns = watched.point, watched.columns
        chosen = self._rows(point, total, pick, tensor)
        if chosen is None or (tensor.shape[0] == total and columns.same_everywhere and self.mesh.tp_rank):
            return
        offsets, index = chosen
        piece = columns.cut(tensor.index_select(0, index).reshape(len(offsets), -1)).to("cpu")
        ranges = columns.ranges_of(piece.shape[1], self.mesh.tp_rank)
        self.file.add(f"{what}/{pick.number}/{watched.block}/{point.name}", piece, offsets, ranges)

    def _rows(
        self, point: Point, total: int, pick: Pick, tensor: torch.Tensor
    ) -> tuple[np.ndarray, torch.Tensor] | None:
        """Offsets and local rows of the pick's rows that this tensor holds; None when it holds none."""
        key = (pick.number, point.rows, point.context, tensor.shape[0] == total, tensor.device)
        if key not in self._index:
            offsets, rows = pick.rows_of(point)
            first = 0 if tensor.shape[0] == total else self.mesh.tp_rank * tensor.shape[0]
            here = (rows >= first) & (rows < first + tensor.shape[0])
            self._index[key] = offsets[here], torch.from_numpy(rows[here] - first).to(tensor.device)
        offsets, index = self._index[key]
        return (offsets, index) if len(offsets) else None

    def _total_rows(self, rows: Rows, number: int, unit: int) -> int:
        batch = self.batches[number]
        return {
            Rows.TOKEN: batch.text.num_tokens,
            Rows.PATCH: batch.vision.num_patches,
            Rows.MERGED: batch.vision.num_patches // unit,
            Rows.LABEL: len(batch.text.label_rows),
        }[rows]

    def _keep_angles(self, stage: RoboBrainStage, batch: MicroBatch, number: int) -> None:
        """cos and sin of the kept rows: the definition of the rotation is applied to the same angles."""
        if self.mesh.tp_rank:
            return
        for pick in self.picks.get(number, ()):
            for layers, rows, inputs in (
                (stage.vision.layers, Rows.PATCH, batch.vision),
                (stage.language.layers, Rows.TOKEN, batch.text),
            ):
                offsets = pick.offsets[rows]
                if not len(layers) or not len(offsets):
                    continue
                index = torch.from_numpy(offsets + pick.first_rows[rows]).to(inputs.rope_cos.device)
                for name, table in (("cos", inputs.rope_cos), ("sin", inputs.rope_sin)):
                    piece = table.index_select(0, index).to("cpu")
                    self.file.add(f"value/{pick.number}/angles/{rows}_{name}", piece, offsets, None)


def blocks_of(stage: RoboBrainStage) -> Iterator[tuple[str, torch.nn.Module]]:
    """The blocks that a stage holds, under their global names."""
    for part_name in ("vision", "language"):
        for name, child in stage.get_submodule(part_name).named_children():
            if isinstance(child, torch.nn.ModuleDict):
                yield from ((f"{part_name}.{name}.{number}", block) for number, block in child.items())
            else:
                yield f"{part_name}.{name}", child


def _hook(module: torch.nn.Module, point: Point, keep: Callable[[torch.Tensor], None]):
    number = point.argument
    if number is None:
        return module.register_forward_hook(lambda _m, _a, out: keep(out[0] if isinstance(out, tuple) else out))
    return module.register_forward_pre_hook(lambda _m, args: _keep_argument(args, number, keep))


def _keep_argument(args: tuple[Any, ...], number: int, keep: Callable[[torch.Tensor], None]) -> tuple[Any, ...]:
    """The arguments to go on with: the kept one as an alias, so that its gradient is what this module gives back.

    What the others give back that read the same tensor (a DeepStack merger beside the next layer) reaches it on this
    stage under one layout, and on the stage before under another.
    """
    alias = args[number].view_as(args[number])
    keep(alias)
    return *args[:number], alias, *args[number + 1 :]


def _columns_of(point: Point, module: torch.nn.Module, mesh: Mesh) -> LocalColumns:
    if mesh.tp_size == 1 or point.columns is Columns.ALL:
        return LocalColumns()
    if point.columns is Columns.HEADS:
        return LocalColumns(heads=True)
    weight: Any = module.weight
    return LocalColumns.of_spec(shard_of(weight), mesh)
