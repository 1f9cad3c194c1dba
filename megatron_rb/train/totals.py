"""Sums over the world at the end of a step: two small reductions and one read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace

import torch
import torch.distributed as dist

from megatron_rb.models.inputs import MicroBatch
from megatron_rb.models.work import Work, work_of
from megatron_rb.parallel.mesh import Mesh
from megatron_rb.platform import Platform


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


OWN_COUNTS = ("num_labels", "stops", "bad_norms", *(field.name for field in fields(Work)))
"""What every rank counts, in the order in which the counts travel."""


def sum_over_world(
    results: Sequence[dict[str, torch.Tensor]],
    batches: Sequence[MicroBatch],
    mesh: Mesh,
    stop_requested: bool,
    finite_norm: bool = True,
    platform: Platform | None = None,
) -> StepTotals:
    """Every rank calls this once a step; every rank gets the same numbers.

    The sums travel between the devices and are read once. Over CPU tensors they would take a ring through all ranks,
    thousands of messages one after the other in a large world.

    Args:
        platform: whose device the results are on; None = the host.
    """
    device = platform.current_device() if platform is not None else torch.device("cpu")
    exact = torch.float64 if platform is None or platform.supports(torch.float64) else torch.float32
    own = {"num_labels": 0, "stops": int(stop_requested), "bad_norms": int(not finite_norm)}
    counts = _to_device([*own.values(), *asdict(_own_work(batches, mesh)).values()], platform)
    loss = torch.zeros(1, dtype=exact, device=device)
    if mesh.tp_rank == 0 and results:
        loss += torch.stack([result["loss_sum"] for result in results]).to(exact).sum()
        counts[0] += torch.stack([result["num_labels"] for result in results]).to(torch.int64).sum()
    dist.all_reduce(counts)
    dist.all_reduce(loss)
    loss_sum, found = _read(counts, loss)
    return StepTotals(
        loss_sum,
        found["num_labels"],
        Work(**{field.name: found[field.name] for field in fields(Work)}),
        stop_requested=found["stops"] > 0,
        finite_norm=not found["bad_norms"],
    )


def _to_device(numbers: list[int], platform: Platform | None) -> torch.Tensor:
    values = torch.tensor(numbers, dtype=torch.int64)
    if platform is None:
        return values
    if platform.offers("pinned_memory"):
        values = values.pin_memory()
    return values.to(platform.current_device(), non_blocking=True)


def _read(counts: torch.Tensor, loss: torch.Tensor) -> tuple[float, dict[str, int]]:
    """The loss and the counts by name: one transfer from the device, the loss as the bits of a whole number."""
    integers = torch.int64 if loss.dtype == torch.float64 else torch.int32
    *numbers, bits = torch.cat([counts, loss.view(integers).to(torch.int64)]).tolist()
    loss_sum = torch.tensor([bits]).to(integers).view(loss.dtype).item()
    return loss_sum, dict(zip(OWN_COUNTS, numbers, strict=True))


def _own_work(batches: Sequence[MicroBatch], mesh: Mesh) -> Work:
    """What this rank adds to the work of the world: one tensor-parallel rank of the first stage speaks for all."""
    if mesh.tp_rank or mesh.pp_rank:
        return Work()
    work = sum((work_of(batch) for batch in batches), Work())
    # Context-parallel ranks have their own tokens and patches of the same samples.
    return replace(work, samples=0) if mesh.cp_rank else work
