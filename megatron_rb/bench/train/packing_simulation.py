"""Packs a mix for many ranks without training: fill and balance of this stack's packing beside the usual ways."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_rb.data.mixes import Mix
from megatron_rb.data.mock_samples import MockSamples
from megatron_rb.data.packing import Budget, fill_step, most_that_fit, plan_step
from megatron_rb.data.sampler import Sampler, SamplerState
from megatron_rb.metrics.balance import Balance, balance_of
from megatron_rb.shapes.shape import RoboBrainShape

Loads = np.ndarray
"""int `[ranks, micro-batches, 2]`: tokens and patches."""


@dataclass(frozen=True)
class PackedSteps:
    """What one way of packing makes of the same samples."""

    name: str
    balance: Balance
    samples_per_second: float
    """Of one process on this machine."""
    seconds_per_step: float


@dataclass(frozen=True)
class StepSlots:
    """Where the micro-batches of a step go."""

    ranks: int
    micro_batches: int
    """Of one rank."""

    @property
    def count(self) -> int:
        return self.ranks * self.micro_batches


Packer = Callable[[np.ndarray, Budget, StepSlots], tuple[int, Loads]]
"""(sizes of the coming samples, budget, grid) -> samples taken, loads."""


def simulate(mix: Mix, shape: RoboBrainShape, ranks: int, steps: int) -> list[PackedSteps]:
    """Pack `steps` steps of a mix for so many data-parallel ranks, in four ways.

    Raises:
        ValueError: ranks or steps below 1, or samples that do not fit.
    """
    if min(ranks, steps) < 1:
        raise ValueError(f"{steps} steps of {ranks} ranks pack nothing; both must be at least 1")
    sizes = MockSamples(mix, shape).sizes
    ways: dict[str, Packer] = {
        "next-fit": _in_order(next_fit),
        "first-fit": _in_order(first_fit),
        "a number of samples": _some_samples(float(sizes[:, 0].mean())),
        "filled micro-batches": _filled,
    }
    grid, budget = StepSlots(ranks, mix.micro_batches), Budget(mix.seq_length, mix.max_patches)
    return [_run(name, way, sizes, budget, grid, steps, mix.seed) for name, way in ways.items()]


def next_fit(sizes: np.ndarray, budget: Budget, count: int) -> tuple[int, np.ndarray]:
    """Each sample goes into the micro-batch of the one before, or opens a new one; `[count, 2]` loads."""
    loads, place = np.zeros((count, 2), dtype=np.int64), 0
    for number, size in enumerate(sizes):
        if (loads[place] + size > budget.limits).any():
            place += 1
            if place == count:
                return number, loads
        loads[place] += size
    return len(sizes), loads


def first_fit(sizes: np.ndarray, budget: Budget, count: int) -> tuple[int, np.ndarray]:
    """Each sample goes into the first micro-batch with room; the step ends at the first sample that finds none."""
    loads = np.zeros((count, 2), dtype=np.int64)
    for number, size in enumerate(sizes):
        room = (loads + size <= budget.limits).all(axis=1)
        if not room.any():
            return number, loads
        loads[int(np.argmax(room))] += size
    return len(sizes), loads


def _in_order(pack: Callable[[np.ndarray, Budget, int], tuple[int, np.ndarray]]) -> Packer:
    """Micro-batches are dealt to the ranks as they come."""

    def packer(sizes: np.ndarray, budget: Budget, grid: StepSlots) -> tuple[int, Loads]:
        taken, loads = pack(sizes, budget, grid.count)
        return taken, loads.reshape(grid.micro_batches, grid.ranks, 2).swapaxes(0, 1)

    return packer


def _some_samples(mean_tokens: float) -> Packer:
    """`data.global_batch_size`: as many samples as the micro-batches would hold if they were 95 % full."""

    def packer(sizes: np.ndarray, budget: Budget, grid: StepSlots) -> tuple[int, Loads]:
        samples = max(1, round(0.95 * grid.count * budget.tokens / mean_tokens))
        return samples, _loads(sizes, plan_step(sizes[:samples], budget, grid.ranks, 1))

    return packer


def _filled(sizes: np.ndarray, budget: Budget, grid: StepSlots) -> tuple[int, Loads]:
    """`data.global_micro_batches`."""
    taken, plan = fill_step(sizes, budget, grid.ranks, grid.count)
    return taken, _loads(sizes, plan)


def _loads(sizes: np.ndarray, plan: list[list[list[int]]]) -> Loads:
    return np.array([[sizes[members].sum(axis=0) for members in rank] for rank in plan])


def _run(
    name: str, way: Packer, sizes: np.ndarray, budget: Budget, grid: StepSlots, steps: int, seed: int
) -> PackedSteps:
    sampler, state = Sampler(len(sizes), shuffle=True), SamplerState(seed)
    loads, samples, seconds = [], 0, 0.0
    for _ in range(steps):
        coming = _coming(sampler, state, sizes, budget, grid)
        started = time.perf_counter()
        taken, load = way(coming, budget, grid)
        seconds += time.perf_counter() - started
        loads.append(load)
        samples += taken
        state = sampler.advance(state, taken)
    return PackedSteps(name, balance_of(loads, budget.tokens), samples / seconds, seconds / steps)


def _coming(sampler: Sampler, state: SamplerState, sizes: np.ndarray, budget: Budget, grid: StepSlots) -> np.ndarray:
    """Sizes of the coming samples, more than a step can hold."""
    count = 8 * grid.count
    while True:
        coming = sizes[sampler.take(state, count)[0]]
        if most_that_fit(coming, budget, grid.count) < count:
            return coming
        count *= 2
