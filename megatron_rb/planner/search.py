"""Every feasible choice of degrees, priced: which layout is the fastest, and how it compares."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from megatron_rb.config.derive import check_tp_size
from megatron_rb.planner.cost import part_seconds
from megatron_rb.planner.partition import Pipeline, Played, first_cut, play, refine
from megatron_rb.planner.predict import Prediction, build_pipeline, expected_maximum, predict, step_seconds
from megatron_rb.planner.reasons import least_memory_of_any, why_no_memory
from megatron_rb.planner.sizes import ModelSizes
from megatron_rb.planner.task import Degrees, Infeasible, Task, budget_of, computed_for, drawn_for, grid_of, shards_of
from megatron_rb.planner.work import part_counts

PP_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
VPP_SIZES = (1, 2, 3, 4)
PACKS = (1, 2, 4)
RANKED = 20
REFINED = 4
"""Choices whose cut is searched by simulation."""
LEAST_FOUND = 8
"""Choices that are looked at though their lower bound says that they cannot be the best."""


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
        degrees_tried = [degrees for _, degrees in candidates]
        nothing = why_no_memory(task, degrees_tried, feasible_degrees) if degrees_tried else _why_no_degrees(task)
        raise Infeasible(nothing)
    found.sort(key=lambda item: item[0])
    results = [
        predict(task, degrees, pipeline, refine(pipeline, lengths) if number < REFINED else _played(pipeline, lengths))
        for number, (_, degrees, pipeline, lengths) in enumerate(found[: 2 * RANKED])
    ]
    return sorted(results, key=lambda item: item.step_seconds)[:RANKED]


def _played(pipeline: Pipeline, lengths: tuple[int, ...]) -> Played:
    return play(pipeline, np.concatenate([[0], np.cumsum(lengths)])[None])


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
                if task.global_micro_batches % (packs * dp * (pp if vpp > 1 else 1)):
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
    batches, weight = computed_for(task, degrees)
    forward, backward = part_seconds(
        task.model, shards_of(task, degrees), batches, task.pricing, grid_of(task, degrees), task.frozen
    )
    count = drawn_for(task, degrees).num_micro_batches
    work = weight * np.tensordot(part_counts(task.model).sum(axis=0), forward + backward, axes=1)
    idle = (degrees.pp - 1) / degrees.vpp * work.min(axis=1)
    return expected_maximum((work.mean(axis=1) * count + idle) / degrees.pp, degrees.dp)


def _why_no_degrees(task: Task) -> str:
    cell = min(tp_sizes(task), default=1)
    if task.global_micro_batches:
        return (
            f"no choice for {task.gpus} gpus divides a step of {task.global_micro_batches} micro-batches evenly over "
            f"its data-parallel ranks; use data.global_micro_batches={task.gpus} or another multiple"
        )
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
