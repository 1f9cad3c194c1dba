"""`Run`: everything a training process holds while it trains, and the few things it can do."""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NoReturn

import numpy as np
import torch
from megatron.core import tensor_parallel
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from megatron_rb.capture.step_capture import StepCapture
from megatron_rb.checkpoint.manager import CheckpointManager
from megatron_rb.checkpoint.sharded import TrainingState
from megatron_rb.config.schema import Config
from megatron_rb.metrics.heartbeat import Heartbeat
from megatron_rb.metrics.record import EvalRecord, StepRecord
from megatron_rb.metrics.writers import Writer
from megatron_rb.models.inputs import MicroBatch
from megatron_rb.models.work import Work
from megatron_rb.parallel.mesh import Mesh
from megatron_rb.parallel.session import Session
from megatron_rb.planner.device import Peak
from megatron_rb.platform import Platform
from megatron_rb.train.adapters import flops_of
from megatron_rb.train.guard import Finding, UpdateGuard, check_state, find_not_finite
from megatron_rb.train.profiler import StepProfiler
from megatron_rb.train.schedule import LearningRateSchedule
from megatron_rb.train.step import Results, accumulate, apply_gradients
from megatron_rb.train.task import StepBatches, Task
from megatron_rb.train.timers import StepTimers
from megatron_rb.train.totals import StepTotals, sum_over_world

logger = logging.getLogger(__name__)

LOSS_SCALE = 1.0
"""Neither bf16 nor fp32 is scaled. Asking the optimizer every step would wait for the device."""


@dataclass(frozen=True)
class StepOutcome:
    """What came of one optimizer step; equal on all ranks."""

    totals: StepTotals
    grad_norm: float | None
    findings: list[Finding] = field(default_factory=list)
    """What is not finite and where, when the update was skipped."""


@dataclass
class Run:
    """One training process. Its parts are complete when it is made; only the counters of steps change."""

    config: Config
    session: Session
    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    schedule: LearningRateSchedule
    task: Task
    checkpoints: CheckpointManager
    writer: Writer
    train_steps: int
    state: TrainingState
    heartbeat: Heartbeat
    timers: StepTimers
    capture: StepCapture
    guard: UpdateGuard
    profiler: StepProfiler
    peak: Peak | None
    """What MFU is a share of."""
    step: int = 0
    saved_step: int = -1
    save_due: bool = False
    evaluations: dict[int, dict[str, float]] = field(default_factory=dict)

    @property
    def mesh(self) -> Mesh:
        return self.session.mesh

    @cached_property
    def _count_flops(self) -> Callable[[Work], float]:
        return flops_of(self.config.model, self.session.shape)

    @property
    def finished(self) -> bool:
        return self.step >= self.train_steps

    def next_batches(self) -> StepBatches:
        """The batches of the next step."""
        with self.profiler.named_range("data"):
            return self.task.next_step()

    def update(self, batches: Sequence[MicroBatch], stop_requested: bool) -> StepOutcome:
        """Forward, backward and, when all numbers are finite, the optimizer step."""

        def run() -> list[dict[str, torch.Tensor]]:
            with self.capture.of_step(self.step + 1, batches):
                return self.task.run(batches)

        with self.profiler.named_range("forward and backward"):
            results, norm = accumulate(self.chunks, self.optimizer, run)
        totals = self.totals(results, batches, stop_requested, finite_norm=norm is None or math.isfinite(norm))
        if totals.sound:
            with self.profiler.named_range("optimizer"):
                apply_gradients(self.optimizer, norm)
            return StepOutcome(totals, norm)
        return StepOutcome(totals, norm, find_not_finite(self.chunks, results, batches, self.mesh))

    def check(self, outcome: StepOutcome) -> None:
        """Count the update of a finished step as made or skipped; ends the run when too many in a row are skipped."""
        self.guard.note(self.step, outcome.totals, outcome.grad_norm, outcome.findings)
        if self.guard.hopeless(outcome.findings):
            self._fail(outcome.totals)
        if self.guard.open:
            # This step's loss was that of the weights before its update.
            self.checkpoints.prove(self.step - 1)

    def report(self, data: StepBatches, outcome: StepOutcome, rates: dict[str, float], start: float) -> None:
        """Write the numbers of a finished step."""
        memory, totals = self.session.platform.memory(), outcome.totals
        self.writer.write_step(
            StepRecord(
                step=self.step,
                epoch=data.epoch,
                loss=totals.loss,
                grad_norm=outcome.grad_norm,
                learning_rates=rates,
                loss_scale=LOSS_SCALE,
                num_tokens=totals.work.tokens,
                num_labels=totals.num_labels,
                num_patches=totals.work.patches,
                num_samples=totals.work.samples,
                seconds=time.perf_counter() - start,
                data_wait_seconds=data.wait_seconds,
                memory_bytes=memory.peak_allocated or memory.allocated,
                flops=self._count_flops(totals.work),
                devices=self.mesh.world_size,
                peak_flops=self.peak.flops if self.peak is not None else None,
                skipped_updates=self.guard.skipped + (not totals.sound),
            )
        )

    def totals(
        self, results: Results, batches: Sequence[MicroBatch], stop_requested: bool, finite_norm: bool
    ) -> StepTotals:
        """Sums of the step over the world."""
        start = time.perf_counter()
        totals = sum_over_world(results, batches, self.mesh, stop_requested, finite_norm, self.session.platform)
        self.timers.add("wait", time.perf_counter() - start)
        return totals

    def compare_ranks(self, data: StepBatches, start: float) -> None:
        """After a step that was measured: gather the times of all ranks and name the one that is slow."""
        if not self.timers.active:
            return
        self.timers.add("data", data.wait_seconds)
        self.heartbeat.sections = dict(self.timers.seconds)
        record = self.timers.gather(self.step, time.perf_counter() - start, self.mesh)
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
            self._judge(values)
        return self.evaluations[self.step]

    def _fail(self, totals: StepTotals) -> NoReturn:
        if totals.num_labels:
            self.checkpoints.set_aside_unproven()
        self.guard.fail(totals, self.checkpoints.way_back())

    def _judge(self, values: dict[str, float]) -> None:
        strange = {name: value for name, value in values.items() if not math.isfinite(value)}
        if strange and self.mesh.rank == 0:
            logger.warning("evaluation at step %d is not finite: %s", self.step, strange)
        if values and not strange and self.guard.open:
            self.checkpoints.prove(self.step)

    def save_if_due(self) -> None:
        """Write a checkpoint every so many steps; while updates are skipped it waits for a good step."""
        self.save_due = self.save_due or self.due(self.config.checkpoint.save_every)
        if self.save_due and self.guard.open:
            self.save()

    def save(self) -> None:
        """Write a checkpoint of the present step, once; none of weights that may be what is wrong."""
        if self.saved_step == self.step or not self.guard.open:
            return
        with self.heartbeat.during("checkpoint"):
            check_state(self.chunks, self.optimizer, self.step)
            self.checkpoints.save(self.step, self.state)
        self.saved_step, self.save_due = self.step, False

    def save_last(self, totals: StepTotals | None) -> None:
        """Save where the run ends or was stopped; a run that ends while its updates are skipped has failed.

        Args:
            totals: of the last step; None = there was none.
        """
        if self.guard.open or totals is None:
            self.save()
        elif self.finished:
            self._fail(totals)
        else:
            logger.warning("not saved: %s; the run continues from its newest checkpoint", self.guard.last)

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


def layout_state(session: Session, sequence_parallel: bool) -> dict[str, Any]:
    """What random states and bitwise results depend on."""
    mesh = session.mesh
    return {
        "tp_size": mesh.tp_size,
        "pp_size": mesh.pp_size,
        "cp_size": mesh.cp_size,
        "dp_size": mesh.dp_size,
        "pipeline": str(session.layout),
        "sequence_parallel": sequence_parallel,
    }
