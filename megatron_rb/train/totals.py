"""Sums over the world at the end of a step: one small reduction of CPU numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch
import torch.distributed as dist

from megatron_rb.models.inputs import MicroBatch
from megatron_rb.models.work import Work, work_of
from megatron_rb.parallel.mesh import Mesh


@dataclass(frozen=True)
class StepTotals:
    """What happened in one step, summed over all ranks and micro-batches."""

    loss_sum: float
    num_labels: int
    work: Work
    """Real rows of the batches; its labels are those of the rows, `num_labels` those that a loss was computed of."""
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
    mesh: Mesh,
    stop_requested: bool,
    finite_norm: bool = True,
) -> StepTotals:
    """Every rank calls this once a step; every rank gets the same numbers."""
    own = {"loss_sum": 0.0, "num_labels": 0.0, "stops": float(stop_requested), "bad_norms": float(not finite_norm)}
    if mesh.tp_rank == 0 and results:
        # One transfer from the device for the whole step.
        sums = torch.stack([torch.stack([result["loss_sum"], result["num_labels"]]) for result in results])
        own["loss_sum"], own["num_labels"] = sums.cpu().double().sum(0).tolist()
    work = asdict(_own_work(batches, mesh))
    values = torch.tensor([*own.values(), *work.values()], dtype=torch.float64)
    dist.all_reduce(values)
    found = dict(zip([*own, *work], values.tolist(), strict=True))
    return StepTotals(
        found["loss_sum"],
        round(found["num_labels"]),
        Work(**{name: round(found[name]) for name in work}),
        stop_requested=found["stops"] > 0,
        finite_norm=not found["bad_norms"],
    )


def _own_work(batches: Sequence[MicroBatch], mesh: Mesh) -> Work:
    """What this rank adds to the work of the world: one tensor-parallel rank of the first stage speaks for all."""
    if mesh.tp_rank or mesh.pp_rank:
        return Work()
    work = sum((work_of(batch) for batch in batches), Work())
    # Context-parallel ranks have their own tokens and patches of the same samples.
    return replace(work, samples=0) if mesh.cp_rank else work
