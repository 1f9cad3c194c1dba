"""Times of several ways to do the same thing, taken in turn."""

from __future__ import annotations

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


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median over the rounds of ours / theirs; neighbours in time meet the same load."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
