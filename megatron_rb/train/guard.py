"""Keeps updates that cannot be meant out of the weights: numbers that are not finite, and steps without a label."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer

from megatron_rb.config.failures import NotFinite
from megatron_rb.models.build import ModelPart, part_of
from megatron_rb.models.inputs import MicroBatch
from megatron_rb.parallel.mesh import Mesh
from megatron_rb.train.gradients import main_grad
from megatron_rb.train.totals import StepTotals

logger = logging.getLogger(__name__)

LISTED = 3
"""Findings and samples named in a sentence before the rest is counted."""


@dataclass(frozen=True)
class Finding:
    """Something on one rank that is not finite."""

    rank: int
    kind: str
    """`weights`, `loss` or `gradients`."""
    where: str
    depth: tuple[int, int] = (0, 0)
    """Virtual chunk and pipeline rank: the backward pass visits the larger ones first."""


@dataclass
class UpdateGuard:
    """Counts the steps whose update was skipped, and ends the run when there are too many in a row.

    A checkpoint is never written while the last update was skipped, so a run that continues starts with none in a row.
    """

    limit: int
    """Skipped updates in a row that end the run."""
    skipped: int = 0
    """Of the whole run, those before it was continued included."""
    in_row: int = 0
    last: str = ""
    """What was wrong with the newest step whose update was skipped."""

    @property
    def open(self) -> bool:
        """Whether the last update was made, so that the weights are known to give finite numbers."""
        return self.in_row == 0

    def note(self, step: int, totals: StepTotals, grad_norm: float | None, findings: Sequence[Finding]) -> None:
        """Take in a finished step; equal on all ranks."""
        if totals.sound:
            self.in_row = 0
            return
        self.skipped, self.in_row = self.skipped + 1, self.in_row + 1
        self.last = describe(step, totals, grad_norm, findings)
        if dist.get_rank() == 0:
            logger.warning("%s; the update is skipped (%d in a row, %d in all)", self.last, self.in_row, self.skipped)

    def hopeless(self, findings: Sequence[Finding]) -> bool:
        """Whether the run has to end: too many updates in a row were skipped, or the weights themselves are broken."""
        return self.in_row >= self.limit or any(finding.kind == "weights" for finding in findings)

    def fail(self, totals: StepTotals, way_back: str) -> NoReturn:
        """End the run, whose last updates were all skipped, with the last of them as the reason.

        Raises:
            NotFinite: numbers were not finite.
            ValueError: there was nothing to learn.
        """
        row = f"{self.in_row} updates in a row were skipped (optimizer.max_bad_steps {self.limit})"
        if not totals.num_labels:
            raise ValueError(
                f"{self.last}; {row}; ledger.jsonl names the files; with them back, the same command goes on"
            )
        raise NotFinite(f"{self.last}; {row}; lower optimizer.lr, or look at these samples; {way_back}")


def describe(step: int, totals: StepTotals, grad_norm: float | None, findings: Sequence[Finding]) -> str:
    """What is wrong with a step, where, in one sentence."""
    if not totals.num_labels:
        return f"step {step} has nothing to learn: none of its {totals.work.samples} samples could be read"
    norm = "" if grad_norm is None else f", gradient norm {grad_norm:g}"
    parts = [f"step {step}: loss {totals.loss:g}{norm}"]
    for kind in ("weights", "loss", "gradients"):
        found = [finding for finding in findings if finding.kind == kind]
        if kind == "gradients":
            # The first block that the backward pass reached with numbers that are not finite passed them on.
            found = sorted(found, key=lambda finding: finding.depth, reverse=True)[:1]
        if found:
            more = f" and on {len(found) - LISTED} ranks more" if len(found) > LISTED else ""
            places = "; ".join(f"rank {finding.rank}, {finding.where}" for finding in found[:LISTED])
            parts.append(f"{kind} not finite on {places}{more}")
    return ", ".join(parts)


def find_not_finite(
    chunks: Sequence[torch.nn.Module],
    results: Sequence[dict[str, torch.Tensor]],
    batches: Sequence[MicroBatch],
    mesh: Mesh,
) -> list[Finding]:
    """What is not finite on any rank; every rank calls this together and gets all of it."""
    losses = _losses(results, batches, mesh.rank) if mesh.tp_rank == 0 else ()
    mine = [*_weights(chunks, mesh.rank), *losses, *_gradients(chunks, mesh)]
    gathered: list[list[Finding]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, mine)
    return [finding for findings in gathered for finding in findings]


def _weights(chunks: Sequence[torch.nn.Module], rank: int) -> Iterator[Finding]:
    bad = not_finite_parameters(chunks)
    if bad:
        yield Finding(rank, "weights", _listed(bad))


def _losses(results: Sequence[dict[str, torch.Tensor]], batches: Sequence[MicroBatch], rank: int) -> Iterator[Finding]:
    for number, (result, batch) in enumerate(zip(results, batches, strict=False)):
        if not math.isfinite(float(result["loss_sum"])):
            yield Finding(rank, "loss", f"micro-batch {number} with {_listed(batch.sample_ids)}")


def _gradients(chunks: Sequence[torch.nn.Module], mesh: Mesh) -> Iterator[Finding]:
    for number in reversed(range(len(chunks))):
        for name, parameter in reversed(list(chunks[number].named_parameters())):
            if parameter.requires_grad and not _all_finite(main_grad(parameter)):
                yield Finding(mesh.rank, "gradients", _named(name), (number, mesh.pp_rank))
                return


def not_finite_parameters(chunks: Sequence[torch.nn.Module]) -> list[str]:
    """Names, with their part of the model, of the parameters on this rank that hold NaN or infinity."""
    named = [(name, parameter) for chunk in chunks for name, parameter in chunk.named_parameters()]
    return [_named(name) for (name, _), fine in zip(named, _finite([p for _, p in named]), strict=True) if not fine]


def check_state(chunks: Sequence[torch.nn.Module], optimizer: MegatronOptimizer, step: int) -> None:
    """Refuse a state that must not be saved; every rank calls this together.

    Raises:
        NotFinite: weights, or sums of the optimizer, are not finite on some rank.
    """
    mine = not_finite_parameters(chunks)
    states = [value for part in _parts(optimizer) for value in _tensors(part)]
    if not all(_finite(states)):
        mine.append("the state of the optimizer")
    worst = torch.tensor(dist.get_rank() if mine else dist.get_world_size())
    dist.all_reduce(worst, op=dist.ReduceOp.MIN)
    if int(worst) == dist.get_world_size():
        return
    problem: list[object] = [_listed(mine)]
    dist.broadcast_object_list(problem, src=int(worst), device=torch.device("cpu"))
    raise NotFinite(
        f"after step {step} rank {int(worst)} holds numbers that are not finite in {problem[0]}; no checkpoint of them "
        f"is written; lower optimizer.lr, then the same command continues from the newest checkpoint"
    )


def _parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def optimizer_tensors(optimizer: MegatronOptimizer) -> Iterator[torch.Tensor]:
    """What an optimizer updates on this rank, and its state of it."""
    for part in _parts(optimizer):
        yield from _tensors(part)


def _tensors(part: MegatronOptimizer) -> Iterator[torch.Tensor]:
    if getattr(part, "is_stub_optimizer", False):
        return
    for parameter, state in part.optimizer.state.items():
        yield parameter
        yield from (value for value in state.values() if isinstance(value, torch.Tensor) and value.is_floating_point())


def _finite(tensors: Sequence[torch.Tensor]) -> list[bool]:
    """Whether all numbers of each tensor are finite: one transfer from the device, no large temporaries."""
    with torch.no_grad():
        flags = [torch.stack(torch.aminmax(tensor.detach())).isfinite().all() for tensor in tensors if tensor.numel()]
    found = iter(torch.stack(flags).tolist() if flags else [])
    return [bool(next(found)) if tensor.numel() else True for tensor in tensors]


def _all_finite(tensor: torch.Tensor) -> bool:
    return _finite([tensor])[0]


def _named(name: str) -> str:
    while name.startswith("module."):
        name = name.removeprefix("module.")
    part: ModelPart = part_of(name)
    return f"{part} ({name})"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
