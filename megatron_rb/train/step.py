"""One forward and backward pass over the micro-batches of a step, on megatron-core's pipeline schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from megatron_rb.models.inputs import MicroBatch, to_device
from megatron_rb.models.language.blocks import HeadOutput
from megatron_rb.models.stage import RoboBrainStage
from megatron_rb.parallel.mesh import Mesh
from megatron_rb.parallel.session import Session
from megatron_rb.shapes.shape import RoboBrainShape
from megatron_rb.train.pipeline import received_values, run_schedule

Results = list[dict[str, torch.Tensor]]
"""Sums per micro-batch on ranks with the head, else nothing."""


@dataclass(frozen=True)
class Runner:
    """What a pass needs beside the batch."""

    chunks: list[DistributedDataParallel]
    """The model chunks of this rank, wrapped for data parallelism."""
    session: Session

    @property
    def shape(self) -> RoboBrainShape:
        return self.session.shape

    @property
    def mesh(self) -> Mesh:
        return self.session.mesh


def train_pass(runner: Runner, batches: Sequence[MicroBatch]) -> list[dict[str, torch.Tensor]]:
    """Forward and backward; gradients end in `main_grad`, summed over the world and divided by its number of labels.

    Returns:
        On ranks with the head, `{"loss_sum", "num_labels"}` of every micro-batch; else an empty list.
    """
    return _run(runner, batches, partial(_loss_step, runner), forward_only=False)


def accumulate(
    chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer, run: Callable[[], Results]
) -> tuple[Results, float | None]:
    """A forward and backward pass up to the optimizer; its results, and the gradient norm before clipping."""
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    results = run()
    optimizer.prepare_grads()
    norm = optimizer.get_grad_norm()
    return results, None if norm is None else float(norm)


def apply_gradients(optimizer: MegatronOptimizer, grad_norm: float | None) -> None:
    """Clip the gradients of `accumulate` and update the weights, as megatron-core's `step` does after its norm."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        parameters = [] if getattr(part, "is_stub_optimizer", False) else part.get_parameters()
        if parameters and grad_norm is not None and part.config.clip_grad > 0:
            clip_grad_by_total_norm_fp32(parameters, max_norm=part.config.clip_grad, total_norm=grad_norm)
    optimizer.step_with_ready_grads()


def update(
    chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer, run: Callable[[], Results]
) -> tuple[Results, float | None]:
    """One optimizer step around a forward and backward pass, whatever its numbers are."""
    results, norm = accumulate(chunks, optimizer, run)
    apply_gradients(optimizer, norm)
    return results, norm


def loss_pass(runner: Runner, batches: Sequence[MicroBatch]) -> list[dict[str, torch.Tensor]]:
    """Like `train_pass` without gradients."""
    with torch.no_grad():
        return _run(runner, batches, partial(_loss_step, runner), forward_only=True)


def logits_pass(runner: Runner, batches: Sequence[MicroBatch]) -> list[torch.Tensor]:
    """fp32 logits `[tokens, vocab / tp]` of every micro-batch on ranks with the head."""
    with torch.no_grad():
        return _run(runner, batches, partial(_logits_step, runner), forward_only=True, collect_non_loss_data=True)


def _run(runner: Runner, batches: Sequence[MicroBatch], step, forward_only: bool, **options) -> list[Any]:
    stage = stage_of(runner.chunks[0])
    values = partial(received_values, runner.session, stage.rows_split_over)
    return run_schedule(runner.session, runner.chunks, batches, step, values, forward_only=forward_only, **options)


def stage_of(chunk: torch.nn.Module) -> RoboBrainStage:
    """The model chunk, out of its wrapper for data parallelism."""
    return cast(RoboBrainStage, chunk.module if isinstance(chunk, DistributedDataParallel) else chunk)


def _loss_step(runner: Runner, iterator: Iterator[MicroBatch], chunk: torch.nn.Module):
    batch = _batch_for(chunk, runner, iterator)
    return chunk(batch), partial(_loss, batch=batch)


def _batch_for(chunk: torch.nn.Module, runner: Runner, iterator: Iterator[MicroBatch]) -> MicroBatch:
    with_pixels = stage_of(chunk).part.needs_pixels
    return to_device(next(iterator), runner.shape, runner.session.device, with_pixels=with_pixels)


def _loss(loss_sum: torch.Tensor, *, batch: MicroBatch):
    num_labels = batch.text.label_weights.sum()
    return loss_sum, num_labels.int(), {"loss_sum": loss_sum.detach(), "num_labels": num_labels}


def _logits_step(runner: Runner, iterator: Iterator[MicroBatch], chunk: torch.nn.Module):
    batch = _batch_for(chunk, runner, iterator)
    return chunk(batch, HeadOutput.ALL_LOGITS), lambda logits, non_loss_data=True: logits.float()
