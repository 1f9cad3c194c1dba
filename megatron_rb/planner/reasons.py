"""Why nothing fits: what binds, with the numbers, and the nearest ask that would do."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np

from megatron_rb.planner.memory import FRAGMENTATION, shared_parameters
from megatron_rb.planner.partition import NEVER, shortest_maximum
from megatron_rb.planner.predict import prefix_of
from megatron_rb.planner.task import Degrees, PlanTask, drawn_for, memory_of
from megatron_rb.planner.work import part_counts

Candidates = Callable[[PlanTask], Iterable[Degrees]]


def why_no_memory(task: PlanTask, candidates: list[Degrees], choices: Candidates) -> str:
    """The memory that is there and that is needed, and the nearest ask that would fit.

    Args:
        choices: all choices of another task, to look for a number of devices that would do.
    """
    least, degrees = min((least_memory_of_any(task, degrees), degrees) for degrees in _leanest(candidates))
    limit = task.pricing.device.memory
    sentence = (
        f"memory binds: of {len(candidates)} choices on {task.gpus} x {task.pricing.device.name} none fits into "
        f"{limit / 1e9:.1f} GB; the smallest, {degrees} with everything recomputed, needs {least / 1e9:.1f} GB"
    )
    more = _more_gpus(task, choices)
    return sentence + f"; use max_gpu_memory={math.ceil(least / 1e9)}e9" + (f", or gpus={more}" if more else "")


def _leanest(candidates: list[Degrees]) -> list[Degrees]:
    """Those that may need the least memory: small micro-batches, one slice a rank, rows and tokens split."""
    if not candidates:
        return []
    packs = min(degrees.micro_batch for degrees in candidates)
    vpp = min(degrees.vpp for degrees in candidates)
    split = {degrees.tp for degrees in candidates if degrees.sequence_parallel}
    widest: dict[tuple[int, int], int] = {}
    for degrees in candidates:
        cell = degrees.tp, degrees.pp
        widest[cell] = max(widest.get(cell, 1), degrees.cp)
    return [
        degrees
        for degrees in candidates
        if degrees.micro_batch == packs
        and degrees.vpp == vpp
        and degrees.cp == widest[degrees.tp, degrees.pp]
        and degrees.sequence_parallel == (degrees.tp in split)
    ]


def _more_gpus(task: PlanTask, choices: Candidates) -> int | None:
    for factor in (2, 4, 8, 16, 32):
        larger = replace(task, gpus=task.gpus * factor)
        candidates = list(choices(larger))
        if any(least_memory_of_any(larger, d) <= task.pricing.device.memory for d in _leanest(candidates)):
            return larger.gpus
    return None


def least_memory_of_any(task: PlanTask, degrees: Degrees) -> float:
    """Bytes that the fullest rank needs at least under any cut, with every layer recomputed and one slice a rank."""
    memory = memory_of(task, degrees)
    prefix = prefix_of(part_counts(task.model))
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
