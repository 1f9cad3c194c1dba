"""Supervised fine-tuning: next-token loss on the assistant's answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_rb.checkpoint.sharded import synchronized_parameters
from megatron_rb.data.dataset import ConversationDataset
from megatron_rb.data.ledger import Ledger
from megatron_rb.data.loader import StepLoader
from megatron_rb.data.packing import Budget, plan_step
from megatron_rb.data.problems import BadSample
from megatron_rb.data.sample import EncodedSample
from megatron_rb.models.robobrain.inputs import IGNORED, MicroBatch, build_micro_batch
from megatron_rb.parallel import groups
from megatron_rb.train.step import Runner, loss_pass, train_pass
from megatron_rb.train.task import StepBatches
from megatron_rb.train.totals import sum_over_world

EVALUATION_STEP = 64
"""Samples that are packed together in an evaluation, over all data-parallel ranks."""


class SupervisedFineTuning:
    """The `sft` task.

    Args:
        evaluation: held-out samples; None = no evaluation.
        needs_pixels: this rank holds the patch embedding.
        micro_batch_multiple: see `StepLoader`.
    """

    def __init__(
        self, runner: Runner, loader: StepLoader, evaluation: ConversationDataset | None, budget: Budget,
        ledger: Ledger, *, needs_pixels: bool, sequence_parallel: bool, micro_batch_multiple: int,
    ) -> None:  # fmt: skip
        self.runner = runner
        self.loader = loader
        self.evaluation = evaluation
        self.budget = budget
        self.ledger = ledger
        self.needs_pixels = needs_pixels
        self.sequence_parallel = sequence_parallel
        self.micro_batch_multiple = micro_batch_multiple
        self.model_group = groups.model_parallel_group_gloo()

    def next_step(self) -> StepBatches:
        step = self.loader.next_step()
        failed = {(batch, sample): reason for batch, sample, reason in step.failed}
        self._drop_failed(step.micro_batches, failed)
        return StepBatches([self._pack(samples) for samples in step.micro_batches], step.epoch, step.wait_seconds)

    def run(self, batches: Sequence[MicroBatch]) -> list[dict[str, torch.Tensor]]:
        return train_pass(self.runner, batches)

    def evaluate(self) -> dict[str, float]:
        """Mean cross entropy per answer token over the held-out samples."""
        if self.evaluation is None:
            return {}
        loss_sum, num_labels = 0.0, 0
        with synchronized_parameters(self.runner.chunks):
            for start in range(0, len(self.evaluation), EVALUATION_STEP):
                numbers = range(start, min(start + EVALUATION_STEP, len(self.evaluation)))
                batches = self._evaluation_batches(numbers)
                results = loss_pass(self.runner, batches)
                totals = sum_over_world(results, batches, self.runner.place, stop_requested=False)
                loss_sum += totals.loss_sum
                num_labels += totals.num_labels
        return {"loss": loss_sum / num_labels}

    def state_dict(self) -> dict[str, Any]:
        return self.loader.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.loader.load_state_dict(dict(state))

    def close(self) -> None:
        self.loader.close()

    def _evaluation_batches(self, numbers: range) -> list[MicroBatch]:
        assert self.evaluation is not None
        place = self.runner.place
        sizes = self.evaluation.sizes[numbers.start : numbers.stop]
        plan = plan_step(np.asarray(sizes), self.budget, place.dp_size, self.micro_batch_multiple)
        batches: list[list[EncodedSample]] = []
        failed: dict[tuple[int, int], str] = {}
        for rows in plan[place.dp_rank]:
            batches.append([])
            for row in rows:
                sample, reason = self._load_evaluation(numbers[row])
                if reason:
                    failed[len(batches) - 1, len(batches[-1])] = reason
                batches[-1].append(sample)
        self._drop_failed(batches, failed)
        return [self._pack(samples) for samples in batches]

    def _load_evaluation(self, number: int) -> tuple[EncodedSample, str]:
        """The sample, and why its pixels are zeros, if they are."""
        assert self.evaluation is not None
        try:
            return self.evaluation.get(number, with_pixels=self.needs_pixels), ""
        except BadSample as problem:
            file, line = self.evaluation.source(number)
            self.ledger.record("unreadable", file, str(problem), line=line, problem=problem.problem)
            return self.evaluation.blank(number), str(problem)

    def _drop_failed(self, batches: Sequence[Sequence[EncodedSample]], failed: Mapping[tuple[int, int], str]) -> None:
        """Take the labels of samples whose media could not be read, on every rank that holds a part of the model.

        Only ranks with the patch embedding open images, but the loss is counted elsewhere, so they tell each other.
        """
        places = [(b, s) for b, samples in enumerate(batches) for s in range(len(samples))]
        mask = torch.tensor([place in failed for place in places], dtype=torch.int32)
        if len(mask):
            dist.all_reduce(mask, op=dist.ReduceOp.MAX, group=self.model_group)
        for bad, (batch, number) in zip(mask.tolist(), places, strict=True):
            if bad:
                sample = batches[batch][number]
                sample.labels = np.full_like(sample.labels, IGNORED)

    def _pack(self, samples: Sequence[EncodedSample]) -> MicroBatch:
        place = self.runner.place
        return build_micro_batch(
            samples, self.runner.shape, tp_rank=place.tp_rank, tp_size=place.tp_size,
            sequence_parallel=self.sequence_parallel,
        )  # fmt: skip
