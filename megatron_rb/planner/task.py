"""What is to be planned, and what follows from one choice of degrees before any cut."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from megatron_rb.config.optimizers import OPTIMIZERS, OptimizerTraits
from megatron_rb.planner.communication import Grid
from megatron_rb.planner.cost import Pricing, model_flops
from megatron_rb.planner.kept import TORCH, Operators
from megatron_rb.planner.memory import MemoryModel, memory_model, state_bytes
from megatron_rb.planner.sizes import ModelSizes
from megatron_rb.planner.trained import Frozen
from megatron_rb.planner.work import Shards
from megatron_rb.planner.workload import Drawn, MicroBatches, MicroBatchLimits, MicroBatchSampler


@dataclass(frozen=True)
class PlanTask:
    """What is to be planned."""

    model: ModelSizes
    pricing: Pricing
    gpus: int
    sampler: MicroBatchSampler
    seq_length: int
    """Tokens of one pack, and the limit of a sample."""
    max_patches: int
    frozen: Frozen = Frozen()
    optimizer: OptimizerTraits = OPTIMIZERS["adamw"]
    operators: Operators = TORCH
    distributed_optimizer: bool = True
    overlap_grad_reduce: bool = True
    overlap_param_gather: bool = True
    padding_buckets: int = 8
    """Sizes that micro-batches are padded to; 0 = they are not padded."""
    global_micro_batches: int = 0
    """Micro-batches of a step over all ranks, when the step is counted in them; 0 = it is counted in samples."""
    asked: dict[str, int] = field(default_factory=dict)
    """Degrees that are given: tp, pp, vpp, cp, micro_batch, sequence_parallel."""

    @property
    def global_batch_size(self) -> int:
        return self.sampler.global_batch_size


@dataclass(frozen=True, order=True)
class Degrees:
    """One choice of how ranks and micro-batches are arranged."""

    tp: int
    pp: int
    vpp: int
    dp: int
    micro_batch: int
    """Packs of seq_length tokens in one micro-batch."""
    sequence_parallel: bool
    cp: int = 1

    @property
    def replica(self) -> int:
        """Ranks that together run one micro-batch."""
        return self.tp * self.pp * self.cp

    def __str__(self) -> str:
        interleaved = f" vpp {self.vpp}" if self.vpp > 1 else ""
        sequence = " sp" if self.sequence_parallel else ""
        context = f" cp {self.cp}" if self.cp > 1 else ""
        return f"tp {self.tp}{sequence} pp {self.pp}{interleaved}{context} dp {self.dp} micro-batch {self.micro_batch}"


class Infeasible(ValueError):
    """No choice fits; the message names what binds and the nearest choice that would do."""


def shards_of(task: PlanTask, degrees: Degrees) -> Shards:
    return Shards(degrees.tp, degrees.sequence_parallel, task.pricing.itemsize, degrees.cp)


def budget_of(task: PlanTask, degrees: Degrees) -> MicroBatchLimits:
    return MicroBatchLimits(task.seq_length * degrees.micro_batch, task.max_patches * degrees.micro_batch)


def drawn_for(task: PlanTask, degrees: Degrees) -> Drawn:
    """The sampled micro-batches of a choice."""
    return task.sampler.draw(budget_of(task, degrees), degrees.dp, _multiple(degrees))


def _multiple(degrees: Degrees) -> int:
    """The number of micro-batches of a rank is a multiple of it."""
    return degrees.pp if degrees.vpp > 1 else 1


def computed_for(task: PlanTask, degrees: Degrees) -> tuple[MicroBatches, float]:
    """What a rank computes of the sampled micro-batches, padding included, and a factor on its time.

    The factor makes the drawn steps weigh what the average step weighs, so that choices do not differ by the luck of
    their draws.
    """
    drawn = drawn_for(task, degrees)

    def whole() -> tuple[MicroBatches, float]:
        expected = model_flops(task.model, task.sampler.mean_step(degrees.dp), task.frozen).sum()
        found = model_flops(task.model, drawn.batches, task.frozen).mean() * drawn.num_micro_batches
        return drawn.padded(largest_micro_batch(task, degrees), task.padding_buckets), float(expected / found)

    # Choices that differ in other degrees compute the same micro-batches.
    key = task.model, task.frozen, task.padding_buckets, budget_of(task, degrees), degrees.dp, _multiple(degrees)
    padded, weight = task.sampler.remember(key, whole)
    frame = drawn.batches.frame_pairs / np.maximum(drawn.batches.patches, 1)
    return padded.of_context_rank(degrees.cp, frame), weight


def grid_of(task: PlanTask, degrees: Degrees) -> Grid:
    return Grid(degrees.tp, degrees.cp, degrees.dp, degrees.pp, task.pricing.device.devices_per_node)


def largest_of_rank(task: PlanTask, degrees: Degrees) -> MicroBatchLimits:
    """The most that memory is needed for on a rank."""
    whole, cp = largest_micro_batch(task, degrees), degrees.cp
    patches = whole.patches
    if cp > 1:
        # Frames are not cut.
        patches = min(patches, max(-(-patches // cp), int(task.sampler.histogram.frame_patches.max(initial=0))))
    return MicroBatchLimits(-(-whole.tokens // cp), patches)


def largest_micro_batch(task: PlanTask, degrees: Degrees) -> MicroBatchLimits:
    """The largest micro-batch there can be: what padding fills the first step with."""
    histogram, budget = task.sampler.histogram, budget_of(task, degrees)
    return MicroBatchLimits(
        _largest(histogram.tokens(task.sampler.merge_unit), histogram.counts, task.global_batch_size, budget.tokens),
        _largest(histogram.patches, histogram.counts, task.global_batch_size, budget.patches),
    )


def _largest(sizes: np.ndarray, counts: np.ndarray, samples: int, limit: int) -> int:
    """The largest samples of one step together, at most the budget (as `data.padding` expects them)."""
    order = np.argsort(-sizes, kind="stable")
    taken = np.minimum(np.cumsum(counts[order]), samples)
    each = np.diff(np.concatenate([[0], taken]))
    return int(min(limit, (each * sizes[order]).sum()))


def memory_of(task: PlanTask, degrees: Degrees) -> MemoryModel:
    state = state_bytes(task.pricing.dtype, task.distributed_optimizer, degrees.cp * degrees.dp, task.optimizer)
    reserved, largest = task.pricing.device.reserved_memory, largest_of_rank(task, degrees)
    return memory_model(task.model, shards_of(task, degrees), largest, state, task.frozen, reserved, task.operators)
