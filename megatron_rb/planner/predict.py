"""Time and memory of one cut: the pipeline as simulated, and what data parallelism and optimizer add to it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from megatron_rb.layout import PipelineLayout
from megatron_rb.planner.communication import boundary_bytes, data_parallel_seconds
from megatron_rb.planner.cost import model_flops, optimizer_seconds, part_seconds
from megatron_rb.planner.memory import SliceRecompute, StageMemory, shared_parameters, stage_memory
from megatron_rb.planner.partition import Choices, Pipeline, Played, first_cut, play, refine
from megatron_rb.planner.task import (
    Degrees,
    Infeasible,
    PlanTask,
    computed_for,
    drawn_for,
    grid_of,
    memory_of,
    shards_of,
)
from megatron_rb.planner.work import PARTS, VISION_LAYERS, part_counts

OVERLAP_SHARE = 0.8
"""Part of the first forward and of the last backward pass that messages can hide behind; the first bucket is late."""


@dataclass(frozen=True)
class Prediction:
    """One layout with what it is expected to do; `mode` says from which figures."""

    mode: str
    degrees: Degrees
    layout: PipelineLayout
    recompute: tuple[SliceRecompute, ...]
    num_micro_batches: int
    step_seconds: float
    tokens_per_second_per_gpu: float
    mfu: float
    bubble_ratio: float
    parts: dict[str, float]
    """Seconds of the step by what takes them: pipeline, gradients, weights, optimizer."""
    memory: tuple[StageMemory, ...]


def evaluate(
    task: PlanTask, degrees: Degrees, layout: PipelineLayout, recompute: tuple[SliceRecompute, ...] | None = None
) -> Prediction:
    """What a given layout is expected to do; without `recompute` the cheapest that fits is taken.

    Raises:
        Infeasible: the layout does not fit into memory.
    """
    pipeline = build_pipeline(task, degrees)
    cuts = np.concatenate([[0], np.cumsum(layout.slice_lengths)])[None]
    choices = None
    if recompute is not None:
        vision = np.array([[item.vision for item in recompute]])
        language = np.array([[item.language for item in recompute]])
        choices = Choices(np.ones_like(vision, dtype=bool), vision, language)
    played = play(pipeline, cuts, choices)
    if not np.isfinite(played.seconds[0]):
        least = least_memory(task, degrees, layout)
        raise Infeasible(
            f"the layout {layout} needs {least / 1e9:.1f} GB on its fullest rank with everything recomputed, the "
            f"device has {task.pricing.device.memory / 1e9:.1f} GB; use a larger tp or pp, or more devices"
        )
    return predict(task, degrees, pipeline, played)


def best_for(task: PlanTask, degrees: Degrees, least_first: int = 1) -> Prediction:
    """The best cut for given degrees.

    Args:
        least_first: blocks that the first slice holds at least.

    Raises:
        Infeasible: no cut fits.
    """
    pipeline = replace(build_pipeline(task, degrees), least_first=least_first)
    lengths = first_cut(pipeline)
    if lengths is None:
        raise Infeasible(f"no cut of {degrees} fits into {task.pricing.device.memory / 1e9:.1f} GB")
    return predict(task, degrees, pipeline, refine(pipeline, lengths))


def build_pipeline(task: PlanTask, degrees: Degrees) -> Pipeline:
    """Times and memory of one choice, for any cut."""
    shards, grid, device = shards_of(task, degrees), grid_of(task, degrees), task.pricing.device
    batches, weight = computed_for(task, degrees)
    forward, backward = part_seconds(task.model, shards, batches, task.pricing, grid, task.frozen)
    counts = part_counts(task.model)
    layers = counts[1 : 1 + task.model.vision.num_layers] * [part in VISION_LAYERS for part in PARTS]
    crossing = boundary_bytes(task.model, shards, batches)
    links = (device.inside_node, device.between_nodes)
    slices = degrees.pp * degrees.vpp
    transfer = np.stack(
        # The shape travels first, then the values.
        [crossing / (link.bandwidth * device.efficiency.link) + 2 * link.latency for link in links]
    )
    transfer[:, [0, -1]] = 0.0
    return Pipeline(
        prefix=prefix_of(counts),
        vision_prefix=prefix_of(layers),
        forward=forward * weight,
        backward=backward * weight,
        transfer=transfer,
        link_of=tuple(links.index(grid.pipeline_link(device, number)) for number in range(slices - 1)),
        memory=memory_of(task, degrees),
        limit=device.memory,
        pp_size=degrees.pp,
        vpp_size=degrees.vpp,
        num_micro_batches=drawn_for(task, degrees).num_micro_batches,
    )


def prefix_of(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros((1, counts.shape[1]), dtype=np.int64), counts.cumsum(axis=0)])


@dataclass(frozen=True)
class StepTime:
    """Expected seconds of a step by what takes them."""

    pipeline: float
    """Forward and backward passes of the slowest data-parallel replica."""
    gradients: float
    """Reduction of gradients that no backward pass hides."""
    weights: float
    """Gathering of weights that no forward pass hides."""
    optimizer: float

    @property
    def total(self) -> float:
        return self.pipeline + self.gradients + self.weights + self.optimizer


def step_seconds(task: PlanTask, degrees: Degrees, pipeline: Pipeline, played: Played) -> StepTime:
    """Pipeline of the slowest replica, then what data parallelism and optimizer add on the slowest rank."""
    pricing, grid = task.pricing, grid_of(task, degrees)
    counts = pipeline.prefix[played.cuts[0, 1:]] - pipeline.prefix[played.cuts[0, :-1]]
    trained = (
        (counts @ pipeline.memory.trained - shared_parameters(pipeline.memory, counts))
        .reshape(degrees.vpp, degrees.pp)
        .sum(axis=0)
    )
    gradient_bytes = 4
    gradients, weights, optimizer = [], [], []
    for rank, numbers in enumerate(trained.tolist()):
        scatter, gather = data_parallel_seconds(
            numbers, gradient_bytes, pricing.itemsize, task.distributed_optimizer, pricing.device, grid
        )
        hidden = _hidden_seconds(task, degrees, pipeline, counts, rank)
        gradients.append(max(0.0, scatter - hidden[1]))
        weights.append(max(0.0, gather - hidden[0]))
        optimizer.append(
            optimizer_seconds(numbers, grid.copies, task.distributed_optimizer, pricing, len(task.optimizer.state))
        )
    makespan = expected_maximum(played.timing.makespan[0], degrees.dp)
    return StepTime(makespan, max(gradients), max(weights), max(optimizer))


def _hidden_seconds(
    task: PlanTask, degrees: Degrees, pipeline: Pipeline, counts: np.ndarray, rank: int
) -> tuple[float, float]:
    """Forward and backward time of one micro-batch in which messages of data parallelism may hide.

    Gradients are reduced during the last backward pass only, and only of the first chunk bucket by bucket.
    """
    mine = counts[rank]
    forward = float(mine @ pipeline.forward[:, :, 0].mean(axis=1)) * OVERLAP_SHARE
    backward = float(mine @ pipeline.backward[:, :, -1].mean(axis=1)) * OVERLAP_SHARE
    reduces = task.overlap_grad_reduce
    gathers = reduces and task.overlap_param_gather and task.distributed_optimizer
    return forward * gathers, backward * reduces


def expected_maximum(samples: np.ndarray, members: int) -> float:
    """Expectation of the largest of `members` independent values, from samples of one value."""
    ordered = np.sort(samples)
    ranks = np.arange(len(ordered) + 1) / len(ordered)
    weights = np.diff(ranks**members)
    return float(ordered @ weights)


def predict(task: PlanTask, degrees: Degrees, pipeline: Pipeline, played: Played) -> Prediction:
    """All figures of one cut."""
    drawn = drawn_for(task, degrees)
    times = step_seconds(task, degrees, pipeline, played)
    mean = task.sampler.mean_step(degrees.dp)
    tokens = float(mean.tokens.sum()) * degrees.dp
    flops = float(model_flops(task.model, mean, task.frozen).sum()) * degrees.dp
    layout = PipelineLayout(task.model.vision.num_layers, task.model.text.num_layers, played.lengths(0), degrees.pp)
    recompute = played.recompute(0)
    peak = task.pricing.device.peak(task.pricing.dtype)
    return Prediction(
        mode=task.pricing.mode,
        degrees=degrees,
        layout=layout,
        recompute=recompute,
        num_micro_batches=drawn.num_micro_batches,
        step_seconds=times.total,
        tokens_per_second_per_gpu=tokens / times.total / task.gpus,
        mfu=flops / times.total / task.gpus / peak,
        bubble_ratio=float(played.timing.bubble_ratio[0].mean()),
        parts=dict(vars(times)),
        memory=tuple(stage_memory(pipeline.memory, layout, recompute, drawn.num_micro_batches)),
    )


def least_memory(task: PlanTask, degrees: Degrees, layout: PipelineLayout) -> float:
    """Bytes that the fullest rank of a layout needs with every layer recomputed."""
    everything = (SliceRecompute(10**6, 10**6),) * layout.num_slices
    count = drawn_for(task, degrees).num_micro_batches
    return max(stage.total for stage in stage_memory(memory_of(task, degrees), layout, everything, count))
