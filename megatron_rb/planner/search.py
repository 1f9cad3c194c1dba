"""Every feasible choice of degrees, priced: which layout is the fastest, and how it compares."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_rb.config.derive import check_tp_size
from megatron_rb.layout.token_axis import token_multiple
from megatron_rb.planner.cost import part_seconds
from megatron_rb.planner.memory import FRAGMENTATION
from megatron_rb.planner.partition import DECODER, Pipeline, Played, first_cut, play, refine
from megatron_rb.planner.predict import Prediction, build_pipeline, expected_maximum, predict, step_seconds
from megatron_rb.planner.reasons import least_memory_of_any, why_no_memory
from megatron_rb.planner.schedule import most_in_flight
from megatron_rb.planner.sizes import ModelSizes
from megatron_rb.planner.task import (
    Degrees,
    Infeasible,
    PlanTask,
    budget_of,
    computed_for,
    drawn_for,
    grid_of,
    memory_of,
    shards_of,
)
from megatron_rb.planner.work import PARTS, part_counts

PP_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
CP_SIZES = (1, 2, 4, 8, 16)
VPP_SIZES = (1, 2, 3, 4)
PACKS = (1, 2, 4)
RANKED = 20
REFINED = 4
"""Choices whose cut is searched by simulation."""
LEAST_FOUND = 8
"""Choices that are looked at though their lower bound says that they cannot be the best."""


def plan(task: PlanTask) -> list[Prediction]:
    """The fastest choices, best first.

    Raises:
        Infeasible: nothing fits.
        ValueError: model, histogram or device cannot be planned for.
    """
    task.pricing.device.peak(task.pricing.dtype)
    task.sampler.histogram.check(task.seq_length, task.max_patches, task.sampler.merge_unit)
    candidates = list(feasible_degrees(task))
    found = _most_promising(task, candidates)
    if not found:
        nothing = why_no_memory(task, candidates, feasible_degrees) if candidates else _why_no_degrees(task)
        raise Infeasible(nothing)
    results = [
        predict(
            task,
            item.degrees,
            item.pipeline,
            refine(item.pipeline, item.lengths) if number < REFINED else _played(item.pipeline, item.lengths),
        )
        for number, item in enumerate(sorted(found, key=lambda item: item.seconds)[: 2 * RANKED])
    ]
    return sorted(results, key=lambda item: item.step_seconds)[:RANKED]


@dataclass(frozen=True)
class _Candidate:
    """A choice with the cut of the dynamic programme."""

    seconds: float
    degrees: Degrees
    pipeline: Pipeline
    lengths: tuple[int, ...]


def _most_promising(task: PlanTask, candidates: Sequence[Degrees]) -> list[_Candidate]:
    """Choices in the order of what they could reach, until none that is left can be the best."""
    # (bound, whether it is the closer one of drawn micro-batches, degrees)
    queue = [(lower_bound(task, degrees), False, degrees) for degrees in candidates]
    heapq.heapify(queue)
    found: list[_Candidate] = []
    while queue:
        bound, is_close, degrees = heapq.heappop(queue)
        best = min((item.seconds for item in found), default=math.inf)
        if len(found) >= LEAST_FOUND and bound > best:
            break
        if not is_close:
            closer = sampled_bound(task, degrees, best if len(found) >= LEAST_FOUND else math.inf)
            if math.isfinite(closer):
                heapq.heappush(queue, (max(bound, closer), True, degrees))
        elif (item := _first_look(task, degrees)) is not None:
            found.append(item)
    return found


def _first_look(task: PlanTask, degrees: Degrees) -> _Candidate | None:
    """A choice with its first cut; None when none fits."""
    if least_memory_of_any(task, degrees) > task.pricing.device.memory:
        return None
    pipeline = build_pipeline(task, degrees)
    lengths = first_cut(pipeline)
    if lengths is None:
        return None
    played = _played(pipeline, lengths)
    if not np.isfinite(played.seconds[0]):
        return None
    return _Candidate(step_seconds(task, degrees, pipeline, played).total, degrees, pipeline, lengths)


def _played(pipeline: Pipeline, lengths: tuple[int, ...]) -> Played:
    return play(pipeline, np.concatenate([[0], np.cumsum(lengths)])[None])


def feasible_degrees(task: PlanTask) -> Iterator[Degrees]:
    """Every choice that the trainer accepts, whatever its memory.

    Raises:
        ValueError: a given degree cannot be had.
    """
    asked, gpus = task.asked, task.gpus
    _check_asked(task)
    blocks = len(part_counts(task.model))
    for tp in [asked["tp"]] if "tp" in asked else tp_sizes(task):
        for pp in [asked["pp"]] if "pp" in asked else [size for size in PP_SIZES if size <= blocks]:
            for cp in [asked["cp"]] if "cp" in asked else CP_SIZES:
                dp = gpus // (tp * pp * cp)
                if gpus % (tp * pp * cp) == 0 and dp <= task.global_batch_size:
                    yield from _rest(task, tp, pp, cp, dp, blocks)


def _rest(task: PlanTask, tp: int, pp: int, cp: int, dp: int, blocks: int) -> Iterator[Degrees]:
    asked = task.asked
    for vpp in [asked["vpp"]] if "vpp" in asked else VPP_SIZES if pp > 1 else (1,):
        if pp * vpp > blocks // (2 if vpp > 1 and "vpp" not in asked else 1):
            continue
        for packs in [asked["micro_batch"]] if "micro_batch" in asked else PACKS:
            for sequence in (True, False) if tp > 1 else (False,):
                if packs * task.seq_length % token_multiple(cp, tp if sequence else 1):
                    continue
                if task.global_micro_batches % (packs * dp * (pp if vpp > 1 else 1)):
                    continue
                if "sequence_parallel" in asked and tp > 1 and sequence != bool(asked["sequence_parallel"]):
                    continue
                yield Degrees(tp, pp, vpp, dp, packs, sequence, cp)


def tp_sizes(task: PlanTask) -> list[int]:
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


def _check_asked(task: PlanTask) -> None:
    tp, pp, cp = (task.asked.get(name, 1) for name in ("tp", "pp", "cp"))
    for name, value in task.asked.items():
        if value < (0 if name == "sequence_parallel" else 1):
            raise ValueError(f"{name} is {value}; it must be at least 1")
    check_tp_size(tp, task.model)
    cell = tp * pp * cp
    if task.gpus % cell:
        lower = task.gpus // cell * cell
        near = f"{lower} or {lower + cell}" if lower else f"{cell}"
        context = f" x cp {cp}" if cp > 1 else ""
        raise ValueError(f"{task.gpus} gpus cannot be split into tp {tp} x pp {pp}{context}; use {near} gpus")
    if task.seq_length % token_multiple(cp, 1):
        raise ValueError(
            f"cp {cp} cuts a micro-batch into {2 * cp} equal parts, which do not divide seq_length {task.seq_length}; "
            f"use seq_length {-(-task.seq_length // (2 * cp)) * 2 * cp}"
        )
    if "vpp" in task.asked and task.asked["vpp"] > 1 and pp == 1 and "pp" in task.asked:
        raise ValueError(f"vpp {task.asked['vpp']} needs a pipeline; pp is 1: use vpp=1 or a larger pp")
    if task.global_batch_size < 1:
        raise ValueError(f"global_batch_size is {task.global_batch_size}; it must be at least 1")


def lower_bound(task: PlanTask, degrees: Degrees) -> float:
    """A step cannot be faster: the work of all samples shared evenly, the pipeline filled and emptied once, nothing
    lost to messages between stages, to uneven micro-batches or to uneven ranks.
    """
    step = task.sampler.mean_step(degrees.dp)
    forward, backward = part_seconds(
        task.model,
        shards_of(task, degrees),
        step.of_context_rank(degrees.cp),
        task.pricing,
        grid_of(task, degrees),
        task.frozen,
    )
    total = float((part_counts(task.model).sum(axis=0) @ (forward + backward)).sum())
    budget = budget_of(task, degrees)
    count = max(1, math.ceil(float(max(step.tokens[0] / budget.tokens, step.patches[0] / budget.patches))))
    multiple = degrees.pp if degrees.vpp > 1 else 1
    count = -(-count // multiple) * multiple
    return total / degrees.pp * (1 + (degrees.pp - 1) / (degrees.vpp * count))


def sampled_bound(task: PlanTask, degrees: Degrees, best: float = math.inf) -> float:
    """As `lower_bound`, for the drawn micro-batches: uneven ranks and the recompute that memory forces count, uneven
    stages do not.

    Args:
        best: seconds of a step that are to be beaten; nothing is said of steps that are longer.
    """
    batches, weight = computed_for(task, degrees)
    forward, backward = part_seconds(
        task.model, shards_of(task, degrees), batches, task.pricing, grid_of(task, degrees), task.frozen
    )
    count = drawn_for(task, degrees).num_micro_batches
    counts = part_counts(task.model).sum(axis=0).astype(np.float64)
    work = weight * np.tensordot(counts, forward + backward, axes=1)
    layer = weight * (forward + backward)[DECODER].mean()
    again = forced_recompute(task, degrees, best / count / layer)
    if not math.isfinite(again):
        return math.inf
    work = work + weight * again * forward[DECODER]
    idle = (degrees.pp - 1) / degrees.vpp * work.min(axis=1)
    return expected_maximum((work.mean(axis=1) * count + idle) / degrees.pp, degrees.dp)


def forced_recompute(task: PlanTask, degrees: Degrees, most_layers: float) -> float:
    """Decoder layers, over all ranks, that are recomputed at least; infinite when they do not fit even so.

    As if layers could be split, and nothing else took memory.

    Args:
        most_layers: decoder layers that a rank may hold, by their time.
    """
    memory, layers = memory_of(task, degrees), task.model.text.num_layers
    one = np.eye(len(PARTS))[DECODER]
    static = float(sum(memory.static(one)))
    kept, saved = float(memory.kept[DECODER]), float((memory.kept - memory.inputs)[DECODER])
    free = (task.pricing.device.memory - memory.reserved) / (1 + FRAGMENTATION) - float(memory.working[DECODER])
    batches = drawn_for(task, degrees).num_micro_batches
    # Of a rank's chunks each has at least so many micro-batches in flight at some one moment.
    held = np.array(
        [most_in_flight(degrees.pp, degrees.vpp, batches, rank).min(axis=1).max() for rank in range(degrees.pp)]
    )
    plain = np.clip(free / (static + held * kept), 0, most_layers).sum()
    if plain >= layers:
        return 0.0
    if saved <= 0 or np.clip(free / (static + held * (kept - saved)), 0, most_layers).sum() < layers:
        return math.inf
    return float((layers - plain) * (static / held.max() + kept) / saved)


def _why_no_degrees(task: PlanTask) -> str:
    cell = min(tp_sizes(task), default=1)
    if task.global_micro_batches:
        return (
            f"no choice for {task.gpus} gpus divides a step of {task.global_micro_batches} micro-batches evenly over "
            f"its data-parallel ranks; use data.global_micro_batches={task.gpus} or another multiple"
        )
    least = task.gpus // (max(tp_sizes(task), default=1) * PP_SIZES[-1] * CP_SIZES[-1])
    if task.global_batch_size < least:
        return (
            f"global_batch_size {task.global_batch_size} binds: {task.gpus} gpus need at least {least} samples a step, "
            f"one for each copy of the model; use global_batch_size={least} or fewer gpus"
        )
    return (
        f"no choice of tp, pp and cp divides {task.gpus} gpus with the degrees asked for ({task.asked or 'none'}) and "
        f"a global_batch_size of {task.global_batch_size}; use a multiple of {max(cell, 8)} gpus"
    )
