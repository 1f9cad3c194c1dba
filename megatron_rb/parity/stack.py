"""This stack's side of a parity check: every rank of a world runs the samples and records what its blocks give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from safetensors.torch import save_file

from megatron_rb.config.schema import Config
from megatron_rb.data.sample import EncodedSample
from megatron_rb.layout.token_axis import ranges_of_rank
from megatron_rb.models.build import ModelOptions, named_parameters, weight_key
from megatron_rb.models.frames import FrameShares
from megatron_rb.models.inputs import MicroBatch, build_micro_batch
from megatron_rb.models.stage import RoboBrainStage
from megatron_rb.parallel.collectives import gather_over
from megatron_rb.parallel.mesh import Mesh
from megatron_rb.parallel.session import Session
from megatron_rb.parallel.sharding import local_to_full, shard_of
from megatron_rb.parity.spec import read_spec
from megatron_rb.train.build import build_model, connect_schedule
from megatron_rb.train.gradients import gradient_finalizer, main_grad, tie_embeddings
from megatron_rb.train.step import Runner, logits_pass, loss_pass, train_pass


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


def default_packs(samples: Sequence[EncodedSample]) -> list[list[EncodedSample]]:
    """Every sample in a micro-batch of its own, except that the last two share one."""
    packs = [[sample] for sample in samples]
    if len(packs) > 2:
        packs[-2:] = [packs[-2] + packs[-1]]
    return packs


def share_packs(packs: list[list[EncodedSample]], mesh: Mesh) -> Packs:
    """Deal packs out to the data-parallel ranks; all run the same number, a multiple of pp_size if interleaved."""
    multiple = mesh.dp_size * (mesh.pp_size if mesh.vpp_size > 1 else 1)
    total = -(-len(packs) // multiple) * multiple
    return Packs(packs, list(range(mesh.dp_rank, total, mesh.dp_size)))


def write_trace(session: Session, config: Config, folder: Path) -> None:
    """Run the samples of a folder through this rank's part of the model and write `rank<N>.safetensors` into it."""
    spec, samples = read_spec(folder)
    stages = build_model(session, ModelOptions.of(config), spec.weights)
    trace = run_stack(session, stages, default_packs(samples), grads=spec.grads)
    path = folder / f"rank{session.mesh.rank}.safetensors"
    save_file({name: value.contiguous() for name, value in trace.items()}, path)


def run_stack(
    session: Session, stages: list[RoboBrainStage], packs: list[list[EncodedSample]], *, grads: bool
) -> dict[str, torch.Tensor]:
    """This rank's part of the stack's trace: tensors by `pack/block/name`, `pack/logits`, `grad/name`, `loss`."""
    mesh, config = session.mesh, stages[0].config
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    chunks = [DistributedDataParallel(config, ddp, stage, disable_bucketing=True) for stage in stages]
    connect_schedule(stages, chunks, gradient_finalizer(tie_embeddings(stages, session), mesh))
    runner = Runner(chunks, session)
    share = share_packs(packs, mesh)
    batches = [
        build_micro_batch(
            share.samples(number),
            session.shape,
            tp_rank=mesh.tp_rank,
            tp_size=mesh.tp_size,
            sequence_parallel=config.sequence_parallel,
            cp_rank=mesh.cp_rank,
            cp_size=mesh.cp_size,
        )
        for number in share.mine
    ]
    recorder = _Recorder(stages, mesh)
    trace = _record_logits(runner, batches, share, recorder)
    recorder.stop()
    trace |= _record_loss(runner, batches, grads)
    if grads:
        trace |= _full_gradients(stages, mesh)
    return trace


def _record_logits(
    runner: Runner, batches: list[MicroBatch], share: Packs, recorder: _Recorder
) -> dict[str, torch.Tensor]:
    outputs = logits_pass(runner, batches)
    trace = recorder.rows(share, runner.shape.vision.merge_unit)
    for number, local in zip(share.mine, outputs, strict=False):
        rows = whole_tokens(torch.cat(gather_over(local, runner.mesh.tp_group), dim=-1), runner.mesh)
        if runner.mesh.tp_rank == 0 and number < len(share.all):
            trace[f"{number:05d}/logits"] = rows[: share.num_tokens(number)].cpu()
    return trace


def _record_loss(runner: Runner, batches: list[MicroBatch], grads: bool) -> dict[str, torch.Tensor]:
    for chunk in runner.chunks:
        chunk.zero_grad_buffer()
    results = (train_pass if grads else loss_pass)(runner, batches)
    totals = torch.zeros(2, dtype=torch.float64)
    if runner.mesh.tp_rank == 0:
        for result in results:
            totals += torch.stack([result["loss_sum"], result["num_labels"]]).double().cpu()
    dist.all_reduce(totals)
    return {"loss": totals[0] / totals[1].clamp(min=1)}


def _full_gradients(stages: Sequence[RoboBrainStage], mesh: Mesh) -> dict[str, torch.Tensor]:
    gradients = {}
    for name, parameter in named_parameters(list(stages)):
        if not parameter.requires_grad:
            continue
        shards = gather_over(main_grad(parameter), mesh.tp_group)
        if mesh.tp_rank == mesh.dp_rank == mesh.cp_rank == 0:
            full = local_to_full([shard.cpu() for shard in shards], shard_of(parameter))
            gradients[f"grad/{weight_key(name, stages[0].shape)}"] = full
    return gradients


class _Recorder:
    """Keeps the output of every block of this rank, pass by pass."""

    def __init__(self, stages: Sequence[RoboBrainStage], mesh: Mesh) -> None:
        self.mesh = mesh
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
                    value = torch.cat(gather_over(value, self.mesh.tp_group))
                samples = share.samples(number)
                if name.startswith("language."):
                    rows = whole_tokens(value, self.mesh)[: share.num_tokens(number)]
                else:
                    rows = _whole_frames(value, samples, 1 if ".layers." in name else merge_unit, self.mesh)
                if self.mesh.tp_rank == 0 and number < len(share.all):
                    kept[f"{number:05d}/block/{name}"] = rows.cpu().clone()
        return kept


def whole_tokens(local: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """Rows of all tokens in order, padding included, from those of each context-parallel rank; all must call this."""
    if mesh.cp_size == 1:
        return local
    whole = local.new_empty(mesh.cp_size * local.shape[0], *local.shape[1:])
    for rank, rows in enumerate(gather_over(local, mesh.cp_group)):
        ranges = ranges_of_rank(len(whole), rank, mesh.cp_size)
        for (start, stop), part in zip(ranges, rows.chunk(len(ranges)), strict=True):
            whole[start:stop] = part
    return whole


def _whole_frames(local: torch.Tensor, samples: Sequence[EncodedSample], unit: int, mesh: Mesh) -> torch.Tensor:
    """Rows of all frames in order, without padding, from those of each context-parallel rank.

    Args:
        unit: patches of a row.
    """
    shares = FrameShares.of([grid for sample in samples for grid in sample.grids], mesh.cp_size)
    ranks = gather_over(local, mesh.cp_group) if mesh.cp_size > 1 else [local]
    free = [0] * mesh.cp_size
    parts = [local[:0]]
    for grid, owners in zip(shares.grids, shares.owners, strict=True):
        for owner in owners.tolist():
            stop = free[owner] + grid.h * grid.w // unit
            parts.append(ranks[owner][free[owner] : stop])
            free[owner] = stop
    return torch.cat(parts)
