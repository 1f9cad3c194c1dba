"""Sums over the world at the end of a step: one small reduction of CPU numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_rb.models.inputs import MicroBatch
from megatron_rb.parallel.groups import Place


@dataclass(frozen=True)
class StepTotals:
    """What happened in one step, summed over all ranks and micro-batches."""

    loss_sum: float
    num_labels: int
    num_tokens: int
    num_patches: int
    num_samples: int
    stop_requested: bool
    """Some rank received a stop signal."""
    finite_norm: bool = True
    """The gradient norm is finite on every rank."""

    @property
    def loss(self) -> float:
        """Cross entropy per label; NaN for a step without labels."""
        return self.loss_sum / self.num_labels if self.num_labels else float("nan")

    @property
    def sound(self) -> bool:
        """Whether there is something to learn and all of it is finite; else the update must not be made."""
        return self.num_labels > 0 and math.isfinite(self.loss_sum) and self.finite_norm


def sum_over_world(
    results: Sequence[dict[str, torch.Tensor]],
    batches: Sequence[MicroBatch],
    place: Place,
    stop_requested: bool,
    finite_norm: bool = True,
) -> StepTotals:
    """Every rank calls this once a step; every rank gets the same numbers."""
    values = torch.zeros(7, dtype=torch.float64)
    if place.tp_rank == 0 and results:
        # One transfer from the device for the whole step.
        sums = torch.stack([torch.stack([result["loss_sum"], result["num_labels"]]) for result in results])
        values[:2] = sums.cpu().double().sum(0)
    if place.tp_rank == 0 and place.pp_rank == 0:
        values[2] = sum(batch.text.num_real_tokens for batch in batches)
        values[3] = sum(batch.vision.num_real_patches for batch in batches)
        # Context-parallel ranks have their own tokens and patches of the same samples.
        values[4] = sum(len(batch.sample_ids) for batch in batches) if place.cp_rank == 0 else 0
    values[5], values[6] = float(stop_requested), float(not finite_norm)
    dist.all_reduce(values)
    loss_sum, *counts, stops, bad_norms = values.tolist()
    labels, tokens, patches, samples = map(round, counts)
    return StepTotals(loss_sum, labels, tokens, patches, samples, stop_requested=stops > 0, finite_norm=not bad_norms)
