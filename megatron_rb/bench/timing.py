"""Times of several ways to do the same thing, taken in turn."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Times:
    """Every call of one side, in seconds."""

    wall: list[float]
    cpu: list[float]
    """Time on all cores that this process used: it hardly depends on what else the machine does."""

    @property
    def median(self) -> float:
        return statistics.median(self.wall)

    @property
    def median_cpu(self) -> float:
        return statistics.median(self.cpu)


def time_in_turn(sides: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Times]:
    """Time calls; each round calls every side once, so that load from elsewhere meets all of them.

    The order turns round by round: nobody always runs in the cache another one left behind.
    """
    times = {name: Times([], []) for name in sides}
    names = list(sides)
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            wall, cpu = time.perf_counter(), time.process_time()
            sides[name]()
            times[name].wall.append(time.perf_counter() - wall)
            times[name].cpu.append(time.process_time() - cpu)
    return times


def time_one_by_one(
    builders: Mapping[str, Callable[[], Callable[[], float]]], rounds: int, after: Callable[[], None]
) -> tuple[dict[str, Times], dict[str, float]]:
    """Build each side, call it once to warm up and `rounds` times for its times, and drop it before the next.

    For devices that hold one side at a time and do nothing else meanwhile.

    Args:
        after: called when a side has been dropped.

    Returns:
        The times, and what the first calls returned.
    """
    times: dict[str, Times] = {}
    firsts: dict[str, float] = {}
    for name, build in builders.items():
        side = build()
        firsts[name] = side()
        times |= time_in_turn({name: side}, rounds)
        del side
        gc.collect()
        after()
    return times, firsts


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median over the rounds of ours / theirs; neighbours in time meet the same load."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
