"""Does this stack compute what transformers computes? The same samples through both, compared block by block.

`run_stack` runs on every rank of a world and records its own side; `compare` sets two traces against each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

from megatron_rb.checkpoint.hf.oracle import Trace
from megatron_rb.data.sample import EncodedSample
from megatron_rb.layout import PipelineLayout
from megatron_rb.layout.token_axis import ranges_of_rank
from megatron_rb.models.build import (
    ModelOptions,
    build_stages,
    named_parameters,
    weight_key,
)
from megatron_rb.models.frames import FrameShares
from megatron_rb.models.inputs import MicroBatch, build_micro_batch
from megatron_rb.models.layers import LayerProvider, LocalLayers
from megatron_rb.models.stage import RoboBrainStage
from megatron_rb.parallel import groups
from megatron_rb.parallel.groups import Place
from megatron_rb.parallel.sharding import local_to_full, shard_of
from megatron_rb.shapes.shape import RoboBrainShape
from megatron_rb.train.build import initialise
from megatron_rb.train.gradients import gradient_finalizer, main_grad, tie_embeddings
from megatron_rb.train.step import Runner, logits_pass, loss_pass, train_pass

LOGITS_TOLERANCE = 1e-4
"""Largest absolute difference of a logit, fp32."""
GRADIENT_TOLERANCE = 1e-3
"""Largest difference of a gradient relative to the largest value of its parameter."""


@dataclass(frozen=True)
class Packs:
    """Samples grouped into micro-batches, and this data-parallel rank's share of them."""

    all: list[list[EncodedSample]]
    mine: list[int]
    """Numbers of the packs this rank runs; numbers past the end are empty packs that fill up the schedule."""

    def samples(self, number: int) -> list[EncodedSample]:
        return self.all[number] if number < len(self.all) else []

    def num_tokens(self, number: int) -> int:
        return sum(len(sample.input_ids) for sample in self.samples(number))


def share_packs(packs: list[list[EncodedSample]], place: Place) -> Packs:
    """Deal packs out to the data-parallel ranks; all run the same number, a multiple of pp_size if interleaved."""
    multiple = place.dp_size * (place.pp_size if place.vpp_size > 1 else 1)
    total = -(-len(packs) // multiple) * multiple
    return Packs(packs, list(range(place.dp_rank, total, place.dp_size)))


def run_stack(
    weights: str,
    shape: RoboBrainShape,
    layout: PipelineLayout,
    place: Place,
    packs: list[list[EncodedSample]],
    *,
    sequence_parallel: bool,
    grads: bool,
    device: torch.device,
    layers: LayerProvider | None = None,
) -> dict[str, torch.Tensor]:
    """This rank's part of the stack's trace: tensors by `pack/block/name`, `pack/logits`, `grad/name`, `loss`.

    Args:
        weights: a checkpoint or a Hugging Face folder.
        layers: None = the local ones.
    """
    options = ModelOptions(dtype="fp32", sequence_parallel=sequence_parallel)
    stages = build_stages(shape, layout, place, options, layers or LocalLayers(), device)
    initialise(stages, shape, place, weights, seed=0)
    tied = tie_embeddings(stages, layout, shape.text.tied_embeddings)
    config = stages[0].config
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    chunks = [DistributedDataParallel(config, ddp, stage, disable_bucketing=True) for stage in stages]
    config.finalize_model_grads_func = gradient_finalizer(tied)
    config.no_sync_func = [c.no_sync for c in chunks] if len(chunks) > 1 else chunks[0].no_sync
    runner = Runner(chunks, shape, place, device)
    share = share_packs(packs, place)
    batches = [
        build_micro_batch(
            share.samples(number),
            shape,
            tp_rank=place.tp_rank,
            tp_size=place.tp_size,
            sequence_parallel=config.sequence_parallel,
            cp_rank=place.cp_rank,
            cp_size=place.cp_size,
        )
        for number in share.mine
    ]
    recorder = _Recorder(stages, place)
    trace = _record_logits(runner, batches, share, recorder)
    recorder.stop()
    trace |= _record_loss(runner, batches, grads)
    if grads:
        trace |= _full_gradients(stages, place)
    return trace


def _record_logits(
    runner: Runner, batches: list[MicroBatch], share: Packs, recorder: _Recorder
) -> dict[str, torch.Tensor]:
    outputs = logits_pass(runner, batches)
    trace = recorder.rows(share, runner.shape.vision.merge_unit)
    for number, local in zip(share.mine, outputs, strict=False):
        rows = whole_tokens(torch.cat(groups.gather_over(local, groups.tp_group()), dim=-1), runner.place)
        if runner.place.tp_rank == 0 and number < len(share.all):
            trace[f"{number:05d}/logits"] = rows[: share.num_tokens(number)].cpu()
    return trace


def _record_loss(runner: Runner, batches: list[MicroBatch], grads: bool) -> dict[str, torch.Tensor]:
    for chunk in runner.chunks:
        chunk.zero_grad_buffer()
    results = (train_pass if grads else loss_pass)(runner, batches)
    totals = torch.zeros(2, dtype=torch.float64)
    if runner.place.tp_rank == 0:
        for result in results:
            totals += torch.stack([result["loss_sum"], result["num_labels"]]).double().cpu()
    dist.all_reduce(totals)
    return {"loss": totals[0] / totals[1].clamp(min=1)}


def _full_gradients(stages: Sequence[RoboBrainStage], place: Place) -> dict[str, torch.Tensor]:
    gradients = {}
    for name, parameter in named_parameters(list(stages)):
        shards = groups.gather_over(main_grad(parameter), groups.tp_group())
        if place.tp_rank == place.dp_rank == place.cp_rank == 0:
            full = local_to_full([shard.cpu() for shard in shards], shard_of(parameter))
            gradients[f"grad/{weight_key(name, stages[0].shape)}"] = full
    return gradients


class _Recorder:
    """Keeps the output of every block of this rank, pass by pass."""

    def __init__(self, stages: Sequence[RoboBrainStage], place: Place) -> None:
        self.place = place
        self.outputs: dict[str, list[torch.Tensor]] = {}
        self.handles: list = []
        self.split_rows = stages[0].rows_split_over > 1
        for stage in stages:
            for name, module in stage.vision.layers.items():
                self._hook(module, f"vision.layers.{name}")
            for name, module in stage.vision.deepstack.items():
                self._hook(module, f"vision.deepstack.{name}")
            if stage.vision.merger is not None:
                self._hook(stage.vision.merger, "vision.merger")
            for name, module in stage.language.layers.items():
                self._hook(module, f"language.layers.{name}")

    def stop(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _hook(self, module: torch.nn.Module, name: str) -> None:
        def record(_module, _args, output):
            self.outputs.setdefault(name, []).append(output.detach().float().squeeze(1))

        self.handles.append(module.register_forward_hook(record))

    def rows(self, share: Packs, merge_unit: int) -> dict[str, torch.Tensor]:
        """Recorded rows without padding, by `pack/block/name`, on tensor-parallel rank 0."""
        kept = {}
        for name, outputs in self.outputs.items():
            for number, value in zip(share.mine, outputs, strict=True):
                if self.split_rows and ".layers." in name:
                    value = torch.cat(groups.gather_over(value, groups.tp_group()))
                samples = share.samples(number)
                if name.startswith("language."):
                    rows = whole_tokens(value, self.place)[: share.num_tokens(number)]
                else:
                    rows = _whole_frames(value, samples, 1 if ".layers." in name else merge_unit, self.place)
                if self.place.tp_rank == 0 and number < len(share.all):
                    kept[f"{number:05d}/block/{name}"] = rows.cpu().clone()
        return kept


def whole_tokens(local: torch.Tensor, place: Place) -> torch.Tensor:
    """Rows of all tokens in order, padding included, from those of each context-parallel rank; all must call this."""
    if place.cp_size == 1:
        return local
    whole = local.new_empty(place.cp_size * local.shape[0], *local.shape[1:])
    for rank, rows in enumerate(groups.gather_over(local, groups.cp_group())):
        ranges = ranges_of_rank(len(whole), rank, place.cp_size)
        for (start, stop), part in zip(ranges, rows.chunk(len(ranges)), strict=True):
            whole[start:stop] = part
    return whole


def _whole_frames(local: torch.Tensor, samples: Sequence[EncodedSample], unit: int, place: Place) -> torch.Tensor:
    """Rows of all frames in order, without padding, from those of each context-parallel rank.

    Args:
        unit: patches of a row.
    """
    shares = FrameShares.of([grid for sample in samples for grid in sample.grids], place.cp_size)
    ranks = groups.gather_over(local, groups.cp_group()) if place.cp_size > 1 else [local]
    free = [0] * place.cp_size
    parts = [local[:0]]
    for grid, owners in zip(shares.grids, shares.owners, strict=True):
        for owner in owners.tolist():
            stop = free[owner] + grid.h * grid.w // unit
            parts.append(ranks[owner][free[owner] : stop])
            free[owner] = stop
    return torch.cat(parts)


def merge_traces(parts: Sequence[dict[str, torch.Tensor]], layout: PipelineLayout) -> Trace:
    """Put the parts of all ranks together into one trace."""
    merged: dict[str, torch.Tensor] = {}
    for part in parts:
        merged |= part
    packs = sorted({key.split("/")[0] for key in merged if key[0].isdigit()})
    names = sorted({key.split("/", 2)[2] for key in merged if "/block/" in key}, key=_pipeline_order)
    return Trace(
        blocks={name: torch.cat([merged[f"{pack}/block/{name}"] for pack in packs]) for name in names},
        logits=torch.cat([merged[f"{pack}/logits"] for pack in packs]),
        loss=float(merged["loss"]),
        gradients={key.removeprefix("grad/"): value for key, value in merged.items() if key.startswith("grad/")},
    )


def _pipeline_order(name: str) -> tuple[int, int]:
    order = ["vision.layers", "vision.deepstack", "vision.merger", "language.layers"]
    prefix, _, number = name.rpartition(".")
    return (order.index(name), 0) if name in order else (order.index(prefix), int(number))


@dataclass(frozen=True)
class Difference:
    """One compared quantity."""

    name: str
    max_abs: float
    relative: float
    """`max_abs` over the largest absolute value of the reference."""
    passed: bool | None
    """None for block outputs, which have no tolerance of their own."""


def compare(ours: Trace, reference: Trace) -> list[Difference]:
    """Blocks in pipeline order, then logits, loss and gradients.

    A gradient is measured against the largest value of its parameter, and no finer than a millionth of the largest
    gradient of the model: below that both sides hold rounding noise.
    """
    rows = [_difference(f"block {name}", ours.blocks[name], reference.blocks[name]) for name in reference.blocks]
    assert ours.logits is not None and reference.logits is not None
    logits = _difference("logits", ours.logits, reference.logits)
    rows.append(Difference(logits.name, logits.max_abs, logits.relative, logits.max_abs <= LOGITS_TOLERANCE))
    gap = abs(ours.loss - reference.loss)
    rows.append(Difference("loss", gap, gap / max(abs(reference.loss), 1e-12), gap <= LOGITS_TOLERANCE))
    if reference.gradients:
        floor = 1e-6 * max(float(g.abs().max()) for g in reference.gradients.values())
        for name, gradient in reference.gradients.items():
            if name not in ours.gradients:
                rows.append(Difference(f"gradient {name}", float("inf"), float("inf"), False))
                continue
            row = _difference(f"gradient {name}", ours.gradients[name], gradient, floor)
            rows.append(Difference(row.name, row.max_abs, row.relative, row.relative <= GRADIENT_TOLERANCE))
    return rows


def _difference(name: str, ours: torch.Tensor, reference: torch.Tensor, floor: float = 1e-12) -> Difference:
    if ours.shape != reference.shape:
        return Difference(f"{name} {tuple(ours.shape)} vs {tuple(reference.shape)}", float("inf"), float("inf"), False)
    if reference.numel() == 0:
        return Difference(name, 0.0, 0.0, None)
    gap = float((ours.double() - reference.double()).abs().max())
    if gap != gap:
        gap = float("inf")
    return Difference(name, gap, gap / max(float(reference.abs().max()), floor), None)


def first_parting(rows: Sequence[Difference]) -> Difference | None:
    """The first block whose relative difference leaves the level of rounding, to tell where to look."""
    return next((row for row in rows if row.name.startswith("block ") and row.relative > LOGITS_TOLERANCE), None)


def default_packs(samples: Sequence[EncodedSample]) -> list[list[EncodedSample]]:
    """Every sample in a micro-batch of its own, except that the last two share one."""
    packs = [[sample] for sample in samples]
    if len(packs) > 2:
        packs[-2:] = [packs[-2] + packs[-1]]
    return packs


def load_rank_traces(folder: str | Path, world_size: int) -> list[dict[str, torch.Tensor]]:
    """The files `rank0.safetensors` ... that the ranks of a parity run wrote."""
    from safetensors.torch import load_file

    return [load_file(Path(folder) / f"rank{rank}.safetensors") for rank in range(world_size)]
