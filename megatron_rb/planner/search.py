"""Every feasible choice of degrees, priced: which layout is the fastest, how it compares, and why others are not."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from megatron_rb.config.derive import check_tp_size
from megatron_rb.layout import PipelineLayout
from megatron_rb.planner.communication import Grid, boundary_bytes, data_parallel_seconds
from megatron_rb.planner.cost import Frozen, Pricing, optimizer_seconds, part_seconds
from megatron_rb.planner.memory import (
    FRAGMENTATION,
    MemoryModel,
    SliceRecompute,
    StageMemory,
    memory_model,
    shared_parameters,
    stage_memory,
    state_bytes,
)
from megatron_rb.planner.partition import NEVER, Choices, Pipeline, Played, first_cut, play, refine, shortest_maximum
from megatron_rb.planner.sizes import ModelSizes
from megatron_rb.planner.work import PARTS, VISION_LAYERS, Shards, model_flops, part_counts
from megatron_rb.planner.workload import Budget, Drawn, Sampler

PP_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
VPP_SIZES = (1, 2, 3, 4)
PACKS = (1, 2, 4)
RANKED = 20
REFINED = 4
"""Choices whose cut is searched by simulation."""
LEAST_FOUND = 8
"""Choices that are looked at though their lower bound says that they cannot be the best."""


@dataclass(frozen=True)
class Task:
    """What is to be planned."""

    model: ModelSizes
    pricing: Pricing
    gpus: int
    sampler: Sampler
    seq_length: int
    """Tokens of one pack, and the limit of a sample."""
    max_patches: int
    frozen: Frozen = Frozen()
    distributed_optimizer: bool = True
    overlap_grad_reduce: bool = True
    overlap_param_gather: bool = True
    asked: dict[str, int] = field(default_factory=dict)
    """Degrees that are given: tp, pp, vpp, micro_batch, sequence_parallel."""

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

    def __str__(self) -> str:
        interleaved = f" vpp {self.vpp}" if self.vpp > 1 else ""
        sequence = " sp" if self.sequence_parallel else ""
        return f"tp {self.tp}{sequence} pp {self.pp}{interleaved} dp {self.dp} micro-batch {self.micro_batch}"


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


class Infeasible(ValueError):
    """No choice fits; the message names what binds and the nearest choice that would do."""


def plan(task: Task) -> list[Prediction]:
    """The fastest choices, best first.

    Raises:
        Infeasible: nothing fits.
        ValueError: model, histogram or device cannot be planned for.
    """
    task.pricing.device.peak(task.pricing.dtype)
    task.sampler.histogram.check(task.seq_length, task.max_patches, task.sampler.merge_unit)
    candidates = sorted(
        ((lower_bound(task, degrees), degrees) for degrees in feasible_degrees(task)), key=lambda item: item[0]
    )
    found: list[tuple[float, Degrees, Pipeline, tuple[int, ...]]] = []
    for bound, degrees in candidates:
        best = min((item[0] for item in found), default=math.inf)
        if len(found) >= LEAST_FOUND and bound > best:
            break
        if len(found) >= LEAST_FOUND and sampled_bound(task, degrees) > best:
            continue
        if least_memory_of_any(task, degrees) > task.pricing.device.memory:
            continue
        pipeline = build_pipeline(task, degrees)
        lengths = first_cut(pipeline)
        if lengths is None:
            continue
        cut = np.concatenate([[0], np.cumsum(lengths)])[None]
        played = play(pipeline, cut)
        if np.isfinite(played.seconds[0]):
            found.append((step_seconds(task, degrees, pipeline, played).total, degrees, pipeline, lengths))
    if not found:
        raise Infeasible(_why_nothing_fits(task, [degrees for _, degrees in candidates]))
    found.sort(key=lambda item: item[0])
    results = [
        predict(task, degrees, pipeline, refine(pipeline, lengths) if number < REFINED else _played(pipeline, lengths))
        for number, (_, degrees, pipeline, lengths) in enumerate(found[: 2 * RANKED])
    ]
    return sorted(results, key=lambda item: item.step_seconds)[:RANKED]


def _played(pipeline: Pipeline, lengths: tuple[int, ...]) -> Played:
    return play(pipeline, np.concatenate([[0], np.cumsum(lengths)])[None])


def evaluate(
    task: Task, degrees: Degrees, layout: PipelineLayout, recompute: tuple[SliceRecompute, ...] | None = None
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


def best_for(task: Task, degrees: Degrees, least_first: int = 1) -> Prediction:
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


def feasible_degrees(task: Task) -> Iterator[Degrees]:
    """Every choice that the trainer accepts, whatever its memory.

    Raises:
        ValueError: a given degree cannot be had.
    """
    asked, gpus = task.asked, task.gpus
    _check_asked(task)
    blocks = len(part_counts(task.model))
    for tp in [asked["tp"]] if "tp" in asked else tp_sizes(task):
        for pp in [asked["pp"]] if "pp" in asked else [size for size in PP_SIZES if size <= blocks]:
            if gpus % (tp * pp) or gpus // (tp * pp) > task.global_batch_size:
                continue
            yield from _rest(task, tp, pp, gpus // (tp * pp), blocks)


def _rest(task: Task, tp: int, pp: int, dp: int, blocks: int) -> Iterator[Degrees]:
    asked = task.asked
    for vpp in [asked["vpp"]] if "vpp" in asked else VPP_SIZES if pp > 1 else (1,):
        if pp * vpp > blocks // (2 if vpp > 1 and "vpp" not in asked else 1):
            continue
        for packs in [asked["micro_batch"]] if "micro_batch" in asked else PACKS:
            for sequence in (True, False) if tp > 1 else (False,):
                if sequence and packs * task.seq_length % tp:
                    continue
                if "sequence_parallel" in asked and tp > 1 and sequence != bool(asked["sequence_parallel"]):
                    continue
                yield Degrees(tp, pp, vpp, dp, packs, sequence)


def tp_sizes(task: Task) -> list[int]:
    """Tensor-parallel degrees that divide the model and stay on one machine."""
    sizes = []
    for size in range(1, task.pricing.device.devices_per_node + 1):
        if task.gpus % size == 0 and _divides(size, task.model):
            sizes.append(size)
    return sizes


def _divides(tp_size: int, model: ModelSizes) -> bool:
    try:
        check_tp_size(tp_size, model)
    except ValueError:
        return False
    return True


def _check_asked(task: Task) -> None:
    tp, pp = task.asked.get("tp", 1), task.asked.get("pp", 1)
    for name, value in task.asked.items():
        if value < (0 if name == "sequence_parallel" else 1):
            raise ValueError(f"{name} is {value}; it must be at least 1")
    check_tp_size(tp, task.model)
    if task.gpus % (tp * pp):
        lower = task.gpus // (tp * pp) * tp * pp
        near = f"{lower} or {lower + tp * pp}" if lower else f"{tp * pp}"
        raise ValueError(f"{task.gpus} gpus cannot be split into tp {tp} x pp {pp}; use {near} gpus")
    if "vpp" in task.asked and task.asked["vpp"] > 1 and pp == 1 and "pp" in task.asked:
        raise ValueError(f"vpp {task.asked['vpp']} needs a pipeline; pp is 1: use vpp=1 or a larger pp")
    if task.global_batch_size < 1:
        raise ValueError(f"global_batch_size is {task.global_batch_size}; it must be at least 1")


def shards_of(task: Task, degrees: Degrees) -> Shards:
    return Shards(degrees.tp, degrees.sequence_parallel, task.pricing.itemsize)


def budget_of(task: Task, degrees: Degrees) -> Budget:
    return Budget(task.seq_length * degrees.micro_batch, task.max_patches * degrees.micro_batch)


def drawn_for(task: Task, degrees: Degrees) -> Drawn:
    """The sampled micro-batches of a choice."""
    multiple = degrees.pp if degrees.vpp > 1 else 1
    return task.sampler.draw(budget_of(task, degrees), degrees.dp, multiple)


def grid_of(task: Task, degrees: Degrees) -> Grid:
    return Grid(degrees.tp, degrees.dp, degrees.pp, task.pricing.device.devices_per_node)


def lower_bound(task: Task, degrees: Degrees) -> float:
    """A step cannot be faster: the work of all samples shared evenly, the pipeline filled and emptied once, nothing
    lost to messages between stages, to uneven micro-batches or to uneven ranks.
    """
    step = task.sampler.mean_step(degrees.dp)
    forward, backward = part_seconds(
        task.model, shards_of(task, degrees), step, task.pricing, grid_of(task, degrees), task.frozen
    )
    total = float((part_counts(task.model).sum(axis=0) @ (forward + backward)).sum())
    budget = budget_of(task, degrees)
    count = max(1, math.ceil(float(max(step.tokens[0] / budget.tokens, step.patches[0] / budget.patches))))
    multiple = degrees.pp if degrees.vpp > 1 else 1
    count = -(-count // multiple) * multiple
    return total / degrees.pp * (1 + (degrees.pp - 1) / (degrees.vpp * count))


def sampled_bound(task: Task, degrees: Degrees) -> float:
    """As `lower_bound`, for the drawn micro-batches: uneven ranks count, uneven stages do not."""
    drawn = drawn_for(task, degrees)
    forward, backward = part_seconds(
        task.model, shards_of(task, degrees), drawn.batches, task.pricing, grid_of(task, degrees), task.frozen
    )
    work = np.tensordot(part_counts(task.model).sum(axis=0), forward + backward, axes=1)
    idle = (degrees.pp - 1) / degrees.vpp * work.min(axis=1)
    return expected_maximum((work.mean(axis=1) * drawn.num_micro_batches + idle) / degrees.pp, degrees.dp)


def largest_of(task: Task, degrees: Degrees) -> Budget:
    """The largest micro-batch that memory is needed for: what padding fills the first step with."""
    histogram, budget = task.sampler.histogram, budget_of(task, degrees)
    return Budget(
        _largest(histogram.tokens(task.sampler.merge_unit), histogram.counts, task.global_batch_size, budget.tokens),
        _largest(histogram.patches, histogram.counts, task.global_batch_size, budget.patches),
    )


def _largest(sizes: np.ndarray, counts: np.ndarray, samples: int, limit: int) -> int:
    """The largest samples of one step together, at most the budget (as `data.padding` expects them)."""
    order = np.argsort(-sizes, kind="stable")
    taken = np.minimum(np.cumsum(counts[order]), samples)
    each = np.diff(np.concatenate([[0], taken]))
    return int(min(limit, (each * sizes[order]).sum()))


def memory_of(task: Task, degrees: Degrees) -> MemoryModel:
    state = state_bytes(task.pricing.dtype, task.distributed_optimizer, degrees.dp)
    reserved = task.pricing.device.reserved_memory
    return memory_model(task.model, shards_of(task, degrees), largest_of(task, degrees), state, task.frozen, reserved)


def build_pipeline(task: Task, degrees: Degrees) -> Pipeline:
    """Times and memory of one choice, for any cut."""
    shards, grid, device = shards_of(task, degrees), grid_of(task, degrees), task.pricing.device
    drawn = drawn_for(task, degrees)
    batches = drawn.batches
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
        prefix=_prefix(counts), vision_prefix=_prefix(layers), forward=forward, backward=backward, transfer=transfer,
        link_of=tuple(links.index(grid.pipeline_link(device, number)) for number in range(slices - 1)),
        memory=memory_of(task, degrees), limit=device.memory, pp_size=degrees.pp, vpp_size=degrees.vpp,
        num_micro_batches=drawn.num_micro_batches,
    )  # fmt: skip


def _prefix(counts: np.ndarray) -> np.ndarray:
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


def step_seconds(task: Task, degrees: Degrees, pipeline: Pipeline, played: Played) -> StepTime:
    """Pipeline of the slowest replica, then what data parallelism and optimizer add on the slowest rank."""
    pricing, grid = task.pricing, grid_of(task, degrees)
    counts = pipeline.prefix[played.cuts[0, 1:]] - pipeline.prefix[played.cuts[0, :-1]]
    trained = (counts @ pipeline.memory.trained - shared_parameters(pipeline.memory, counts)).reshape(
        degrees.vpp, degrees.pp
    ).sum(axis=0)  # fmt: skip
    gradient_bytes = 4
    gradients, weights, optimizer = [], [], []
    for rank, numbers in enumerate(trained.tolist()):
        scatter, gather = data_parallel_seconds(
            numbers, gradient_bytes, pricing.itemsize, task.distributed_optimizer, pricing.device, grid
        )
        hidden = _hidden_seconds(task, degrees, pipeline, counts, rank)
        gradients.append(max(0.0, scatter - hidden[1]))
        weights.append(max(0.0, gather - hidden[0]))
        optimizer.append(optimizer_seconds(numbers, degrees.dp, task.distributed_optimizer, pricing))
    makespan = expected_maximum(played.timing.makespan[0], degrees.dp)
    return StepTime(makespan, max(gradients), max(weights), max(optimizer))


OVERLAP_SHARE = 0.8
"""Part of the first forward and of the last backward pass that messages can hide behind; the first bucket is late."""


def _hidden_seconds(
    task: Task, degrees: Degrees, pipeline: Pipeline, counts: np.ndarray, rank: int
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


def predict(task: Task, degrees: Degrees, pipeline: Pipeline, played: Played) -> Prediction:
    """All figures of one cut."""
    drawn = drawn_for(task, degrees)
    times = step_seconds(task, degrees, pipeline, played)
    of_step = drawn.num_micro_batches * degrees.dp
    tokens = float(drawn.batches.tokens.mean()) * of_step
    flops = float(model_flops(task.model, drawn.batches).mean()) * of_step
    layout = PipelineLayout(task.model.vision.num_layers, task.model.text.num_layers, played.lengths(0), degrees.pp)
    recompute = played.recompute(0)
    peak = task.pricing.device.peak(task.pricing.dtype)
    return Prediction(
        mode=task.pricing.mode, degrees=degrees, layout=layout, recompute=recompute,
        num_micro_batches=drawn.num_micro_batches, step_seconds=times.total,
        tokens_per_second_per_gpu=tokens / times.total / task.gpus, mfu=flops / times.total / task.gpus / peak,
        bubble_ratio=float(played.timing.bubble_ratio[0].mean()), parts=dict(vars(times)),
        memory=tuple(stage_memory(pipeline.memory, layout, recompute, drawn.num_micro_batches)),
    )  # fmt: skip


def least_memory(task: Task, degrees: Degrees, layout: PipelineLayout) -> float:
    """Bytes that the fullest rank of a layout needs with every layer recomputed."""
    everything = (SliceRecompute(10**6, 10**6),) * layout.num_slices
    count = drawn_for(task, degrees).num_micro_batches
    return max(stage.total for stage in stage_memory(memory_of(task, degrees), layout, everything, count))


def _why_nothing_fits(task: Task, candidates: list[Degrees]) -> str:
    """What binds, and the nearest ask that would fit."""
    if not candidates:
        return _why_no_degrees(task)
    least, degrees = min((least_memory_of_any(task, degrees), degrees) for degrees in _leanest(candidates))
    limit = task.pricing.device.memory
    sentence = (
        f"memory binds: of {len(candidates)} choices on {task.gpus} x {task.pricing.device.name} none fits into "
        f"{limit / 1e9:.1f} GB; the smallest, {degrees} with everything recomputed, needs {least / 1e9:.1f} GB"
    )
    more = _more_gpus(task)
    return sentence + f"; use max_gpu_memory={math.ceil(least / 1e9)}e9" + (f", or gpus={more}" if more else "")


def _leanest(candidates: list[Degrees]) -> list[Degrees]:
    """Those that may need the least memory: small micro-batches, one slice a rank, rows split where possible."""
    if not candidates:
        return []
    packs = min(degrees.micro_batch for degrees in candidates)
    vpp = min(degrees.vpp for degrees in candidates)
    split = {degrees.tp for degrees in candidates if degrees.sequence_parallel}
    return [
        degrees
        for degrees in candidates
        if degrees.micro_batch == packs and degrees.vpp == vpp and degrees.sequence_parallel == (degrees.tp in split)
    ]


def _more_gpus(task: Task) -> int | None:
    for factor in (2, 4, 8, 16, 32):
        larger = replace(task, gpus=task.gpus * factor)
        candidates = list(feasible_degrees(larger))
        if any(least_memory_of_any(larger, d) <= task.pricing.device.memory for d in _leanest(candidates)):
            return larger.gpus
    return None


def least_memory_of_any(task: Task, degrees: Degrees) -> float:
    """Bytes that the fullest rank needs at least under any cut, with every layer recomputed and one slice a rank."""
    memory = memory_of(task, degrees)
    prefix = _prefix(part_counts(task.model))
    first, end = np.triu_indices(len(prefix), 1)
    counts = prefix[end] - prefix[first]
    static = sum(memory.static(counts, shared_parameters(memory, counts)))
    working = ((memory.working + np.where(memory.inputs < memory.kept, memory.kept, 0)) * (counts > 0)).max(axis=1)
    batches = drawn_for(task, degrees).num_micro_batches
    tables = []
    for rank in range(degrees.pp):
        table = np.full((len(prefix), len(prefix)), NEVER, dtype=np.int64)
        held = min(batches, degrees.pp - rank)
        used = (static + held * (counts @ memory.inputs) + working) * (1 + FRAGMENTATION) + memory.reserved
        table[first, end] = np.ceil(used)
        tables.append(table)
    return float(shortest_maximum(tables))


def _why_no_degrees(task: Task) -> str:
    cell = min(tp_sizes(task), default=1)
    if task.global_batch_size < task.gpus // (max(tp_sizes(task), default=1) * PP_SIZES[-1]):
        least = task.gpus // (max(tp_sizes(task), default=1) * PP_SIZES[-1])
        return (
            f"global_batch_size {task.global_batch_size} binds: {task.gpus} gpus need at least {least} samples a step, "
            f"one for each copy of the model; use global_batch_size={least} or fewer gpus"
        )
    return (
        f"no choice of tp and pp divides {task.gpus} gpus with the degrees asked for ({task.asked or 'none'}) and a "
        f"global_batch_size of {task.global_batch_size}; use a multiple of {max(cell, 8)} gpus"
    )
