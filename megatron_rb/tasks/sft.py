"""Supervised fine-tuning: next-token loss on the assistant's answers."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_rb.checkpoint.sharded import synchronized_parameters
from megatron_rb.data.ledger import Ledger
from megatron_rb.data.loader import SampleSource, StepLoader, StepSamples
from megatron_rb.data.packing import Budget, plan_step, share_out
from megatron_rb.data.padding import NO_PADDING, PaddingPlan, PaddingPolicy, Size, plan_sizes
from megatron_rb.data.problems import BadSample
from megatron_rb.data.sample import EncodedSample
from megatron_rb.models.inputs import IGNORED, MicroBatch, build_micro_batch, pinned, with_pixels_as
from megatron_rb.parallel.groups import replica_group_gloo
from megatron_rb.train.step import Runner, loss_pass, train_pass
from megatron_rb.train.task import StepBatches
from megatron_rb.train.totals import sum_over_world

logger = logging.getLogger(__name__)

EVALUATION_STEP = 64
"""Samples that are packed together in an evaluation, over all data-parallel ranks."""


Packed = tuple[StepSamples, PaddingPlan, list[MicroBatch]]
"""Samples of a step, what they are padded to, and the micro-batches made of them."""


class PackAhead:
    """Packs the next step on a thread of its own while the present one runs."""

    def __init__(
        self,
        loader: StepLoader,
        pack: Callable[[Sequence[EncodedSample], Size], MicroBatch],
        padding: PaddingPolicy | None,
    ) -> None:
        self._loader = loader
        self._pack = pack
        self._padding = padding
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pack")
        self._next: Future[tuple[Packed, dict[str, Any]]] | None = None
        self.state = loader.state_dict()
        """State of the loader after the step handed out last; the loader itself is one step ahead."""

    def next_step(self) -> Packed:
        """The next step."""
        present = self._next or self._thread.submit(self._prepare)
        packed, self.state = present.result()
        self._next = self._thread.submit(self._prepare)
        return packed

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after another step."""
        if self._next is not None:
            self._next.result()
            self._next = None
        if self._padding is not None:
            self._padding.restart()
        self._loader.load_state_dict(state)
        self.state = state

    def close(self) -> None:
        """Stop the threads."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._loader.close()

    def _prepare(self) -> tuple[Packed, dict[str, Any]]:
        step = self._loader.next_step()
        plan = self._padding.plan(step.sizes) if self._padding is not None else NO_PADDING
        batches = [self._pack(samples, size_of(plan, number)) for number, samples in enumerate(step.micro_batches)]
        return (step, plan, batches), self._loader.state_dict()


def size_of(plan: PaddingPlan, number: int) -> Size:
    """What a micro-batch is padded to at least."""
    return plan.sizes[number] if plan.sizes else Size(0, 0)


@dataclass(frozen=True)
class BatchRules:
    """How samples become the micro-batches of this rank."""

    budget: Budget
    needs_pixels: bool
    """This rank holds the patch embedding."""
    sequence_parallel: bool = False
    multiple: int = 1
    """Every rank gets a multiple of this many micro-batches."""
    padding: PaddingPolicy | None = None
    """Sizes that micro-batches are padded to; None = their own."""
    pixel_dtype: torch.dtype = torch.float32
    """Of the pixels when they are copied to the device."""
    pin_memory: bool = False
    """The device copies from page-locked memory without waiting."""
    outgrown: Callable[[PaddingPlan], None] = lambda plan: None
    """Called before a step that outgrew the padding."""


class SupervisedFineTuning:
    """The `sft` task.

    Args:
        evaluation: held-out samples; None = no evaluation.
        ledger: samples that cannot be read are named there.
    """

    def __init__(
        self,
        runner: Runner,
        loader: StepLoader,
        evaluation: SampleSource | None,
        ledger: Ledger,
        rules: BatchRules,
    ) -> None:
        self.runner, self.loader, self.evaluation, self.ledger, self.rules = runner, loader, evaluation, ledger, rules
        self.replica_group = replica_group_gloo(runner.mesh)
        self.ahead = PackAhead(loader, self._pack, rules.padding)

    def next_step(self) -> StepBatches:
        start = time.perf_counter()
        step, plan, batches = self.ahead.next_step()
        waited = time.perf_counter() - start
        self.loader.note(step)
        failed = {(sample.micro_batch, sample.place) for sample in step.failed}
        for number in self._drop_failed(step.micro_batches, failed):
            batches[number] = self._pack(step.micro_batches[number], size_of(plan, number))
        if plan.outgrown is not None:
            self.rules.outgrown(plan)
        return StepBatches(batches, step.epoch, waited)

    def run(self, batches: Sequence[MicroBatch]) -> list[dict[str, torch.Tensor]]:
        return train_pass(self.runner, batches)

    def evaluate(self) -> dict[str, float]:
        """Mean cross entropy per answer token over the held-out samples; absent when none of them can be read."""
        return {} if self.evaluation is None else self.mean_loss("loss", range(len(self.evaluation)))

    def mean_loss(self, name: str, rows: Sequence[int]) -> dict[str, float]:
        """Mean cross entropy per answer token over some of the held-out samples, under a name.

        Nothing, and a line in the log, when not one of these samples can be read.
        """
        loss_sum, num_labels = 0.0, 0
        with synchronized_parameters(self.runner.chunks):
            for start in range(0, len(rows), EVALUATION_STEP):
                batches = self._evaluation_batches(rows[start : start + EVALUATION_STEP])
                results = loss_pass(self.runner, batches)
                totals = sum_over_world(
                    results, batches, self.runner.mesh, stop_requested=False, platform=self.runner.session.platform
                )
                loss_sum += totals.loss_sum
                num_labels += totals.num_labels
        if not num_labels and self.runner.mesh.rank == 0:
            logger.warning(
                "no %s: none of the %d held-out samples could be read; %s names the files",
                name,
                len(rows),
                self.ledger.path,
            )
        return {name: loss_sum / num_labels} if num_labels else {}

    def state_dict(self) -> dict[str, Any]:
        return self.ahead.state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.ahead.load_state_dict(dict(state))

    def close(self) -> None:
        self.ahead.close()

    def _evaluation_batches(self, numbers: Sequence[int]) -> list[MicroBatch]:
        assert self.evaluation is not None
        mesh = self.runner.mesh
        sizes = self.evaluation.sizes[np.asarray(numbers)]
        plan = plan_step(np.asarray(sizes), self.rules.budget, mesh.dp_size, self.rules.multiple)
        padded = [
            self.rules.padding.bucket(size) if self.rules.padding else Size(0, 0) for size in plan_sizes(sizes, plan)
        ]
        batches: list[list[EncodedSample]] = []
        failed: set[tuple[int, int]] = set()
        mine = [row for rows in plan[mesh.dp_rank] for row in rows]
        owners = iter(share_out(sizes[mine, 1], mesh.tp_size))
        for rows in plan[mesh.dp_rank]:
            batches.append([])
            for row in rows:
                sample, readable = self._load_evaluation(numbers[row], next(owners) == mesh.tp_rank)
                if not readable:
                    failed.add((len(batches) - 1, len(batches[-1])))
                batches[-1].append(sample)
        self._drop_failed(batches, failed)
        return [self._pack(samples, size) for samples, size in zip(batches, padded, strict=True)]

    def _load_evaluation(self, number: int, mine: bool) -> tuple[EncodedSample, bool]:
        """The sample, and whether its media could be read; its pixels are zeros if not, or if another rank opens it."""
        assert self.evaluation is not None
        if self.rules.needs_pixels and not mine:
            return self.evaluation.blank(number), True
        try:
            return self.evaluation.get(number, with_pixels=self.rules.needs_pixels), True
        except BadSample as problem:
            file, line = self.evaluation.source(number)
            self.ledger.record("unreadable", file, str(problem), line=line, problem=problem.problem)
            return self.evaluation.blank(number), False

    def _drop_failed(self, batches: Sequence[Sequence[EncodedSample]], failed: Set[tuple[int, int]]) -> set[int]:
        """Take the labels of samples whose media could not be read, on every rank that has these samples.

        Only ranks with the patch embedding open images, but the loss is counted elsewhere, so they tell each other.

        Returns:
            Numbers of the micro-batches that have changed.
        """
        places = [(b, s) for b, samples in enumerate(batches) for s in range(len(samples))]
        mask = torch.tensor([place in failed for place in places], dtype=torch.int32)
        if len(mask):
            dist.all_reduce(mask, op=dist.ReduceOp.MAX, group=self.replica_group)
        bad = [place for place, flag in zip(places, mask.tolist(), strict=True) if flag]
        for batch, number in bad:
            sample = batches[batch][number]
            sample.labels = np.full_like(sample.labels, IGNORED)
        return {batch for batch, _ in bad}

    def _pack(self, samples: Sequence[EncodedSample], padded: Size) -> MicroBatch:
        mesh = self.runner.mesh
        batch = build_micro_batch(
            samples,
            self.runner.shape,
            tp_rank=mesh.tp_rank,
            tp_size=mesh.tp_size,
            sequence_parallel=self.rules.sequence_parallel,
            cp_rank=mesh.cp_rank,
            cp_size=mesh.cp_size,
            padded=padded,
            pixels_shared=self.rules.needs_pixels and mesh.tp_size > 1,
        )
        batch = with_pixels_as(batch, self.rules.pixel_dtype)
        return pinned(batch) if self.rules.pin_memory else batch
