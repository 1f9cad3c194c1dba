"""`Run`: everything a training process holds while it trains, and the few things it can do."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from megatron.core import tensor_parallel
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from megatron_rb.checkpoint.manager import CheckpointManager
from megatron_rb.checkpoint.sharded import TrainingState
from megatron_rb.config.schema import Config
from megatron_rb.metrics.heartbeat import Heartbeat
from megatron_rb.metrics.record import EvalRecord, StepRecord
from megatron_rb.metrics.writers import Writer
from megatron_rb.models.robobrain.inputs import MicroBatch
from megatron_rb.parallel.groups import Place
from megatron_rb.platform import Platform
from megatron_rb.train.capture.capture import StepCapture
from megatron_rb.train.schedule import LearningRateSchedule
from megatron_rb.train.sections import SectionTimer
from megatron_rb.train.step import update
from megatron_rb.train.task import StepBatches, Task
from megatron_rb.train.totals import StepTotals, sum_over_world


@dataclass
class Run:
    """One training process. Its parts are complete when it is made; only `step` changes."""

    config: Config
    place: Place
    platform: Platform
    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    schedule: LearningRateSchedule
    task: Task
    checkpoints: CheckpointManager
    writer: Writer
    train_steps: int
    state: TrainingState
    heartbeat: Heartbeat
    sections: SectionTimer
    capture: StepCapture
    step: int = 0
    saved_step: int = -1
    evaluations: dict[int, dict[str, float]] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        return self.step >= self.train_steps

    def update(self, batches: Sequence[MicroBatch]) -> tuple[list[dict[str, torch.Tensor]], float | None]:
        """Forward, backward and optimizer step; returns the sums per micro-batch and the gradient norm."""

        def run() -> list[dict[str, torch.Tensor]]:
            with self.capture.of_step(self.step + 1, batches):
                return self.task.run(batches)

        return update(self.chunks, self.optimizer, run)

    def report(
        self, data: StepBatches, totals: StepTotals, rates: dict[str, float], norm: float | None, start: float
    ) -> None:
        """Write the numbers of a finished step."""
        memory = self.platform.memory()
        self.writer.write_step(
            StepRecord(
                step=self.step,
                epoch=data.epoch,
                loss=totals.loss,
                grad_norm=norm,
                learning_rates=rates,
                loss_scale=float(self.optimizer.get_loss_scale().item()),
                num_tokens=totals.num_tokens,
                num_labels=totals.num_labels,
                num_patches=totals.num_patches,
                num_samples=totals.num_samples,
                seconds=time.perf_counter() - start,
                data_wait_seconds=data.wait_seconds,
                memory_bytes=memory.peak_allocated or memory.allocated,
            )
        )

    def totals(self, results, batches: Sequence[MicroBatch], stop_requested: bool) -> StepTotals:
        """Sums of the step over the world."""
        start = time.perf_counter()
        totals = sum_over_world(results, batches, self.place, stop_requested)
        self.sections.add("wait", time.perf_counter() - start)
        return totals

    def compare_ranks(self, data: StepBatches, start: float) -> None:
        """After a step that was measured: gather the times of all ranks and name the one that is slow."""
        if not self.sections.active:
            return
        self.sections.add("data", data.wait_seconds)
        self.heartbeat.sections = dict(self.sections.seconds)
        record = self.sections.gather(self.step, time.perf_counter() - start, self.place)
        self.writer.write_ranks(record)

    def due(self, every: int) -> bool:
        """Is something that happens every so many steps due after this one? 0 = never before the end."""
        return every > 0 and self.step % every == 0

    def evaluate(self) -> dict[str, float]:
        """Evaluate the present weights once."""
        if self.step not in self.evaluations:
            with self.heartbeat.during("evaluate"):
                values = self.evaluations[self.step] = self.task.evaluate()
                if values:
                    self.writer.write_eval(EvalRecord(self.step, values))
        return self.evaluations[self.step]

    def save(self) -> None:
        """Write a checkpoint of the present step, once."""
        if self.saved_step != self.step:
            with self.heartbeat.during("checkpoint"):
                self.checkpoints.save(self.step, self.state)
            self.saved_step = self.step

    def finish_saving(self) -> None:
        """Wait until the newest checkpoint is published."""
        with self.heartbeat.during("checkpoint"):
            self.checkpoints.maybe_finalize(blocking=True)

    def close(self) -> None:
        """Complete what is still being written."""
        with self.heartbeat.during("checkpoint"):
            self.checkpoints.close()
        with self.heartbeat.during("close"):
            self.writer.close()
            self.task.close()


def seed_everything(seed: int, platform: Platform) -> None:
    """Seed every generator of this process."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    platform.seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def layout_state(place: Place, layout: str, sequence_parallel: bool) -> dict[str, Any]:
    """What random states and bitwise results depend on."""
    return {
        "tp_size": place.tp_size,
        "pp_size": place.pp_size,
        "cp_size": place.cp_size,
        "dp_size": place.dp_size,
        "pipeline": layout,
        "sequence_parallel": sequence_parallel,
    }
