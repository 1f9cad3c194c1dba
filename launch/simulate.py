"""What faults cost a large run: a simulation of failures, restarts and checkpoints over time. No torch, no clock."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class FaultFigures:
    """Times in seconds."""

    mean_time_to_failure: float
    """Of the whole run."""
    notice: float
    """From a fault until it is acted upon."""
    restart: float
    """From then until the model steps again: new processes, weights, communicators."""
    checkpoint_every: float
    checkpoint_stall: float
    """Time for which a checkpoint holds the steps up."""


def simulate_ettr(figures: FaultFigures, days: float, seed: int = 0) -> float:
    """Effective training time ratio of a run in which failures come at random (exponentially spaced).

    Work since the last checkpoint is done again after a failure; a failure may also strike during a restart.
    """
    draw = random.Random(seed)
    end, clock, kept = days * 86400, 0.0, 0.0
    failure = draw.expovariate(1 / figures.mean_time_to_failure)
    cycle = figures.checkpoint_every + figures.checkpoint_stall
    while clock < end:
        cycles = int((failure - clock) // cycle) if failure > clock else 0
        kept += cycles * figures.checkpoint_every
        clock = failure + figures.notice + figures.restart
        failure += draw.expovariate(1 / figures.mean_time_to_failure)
        while failure < clock:
            clock = failure + figures.notice + figures.restart
            failure += draw.expovariate(1 / figures.mean_time_to_failure)
    return min(1.0, kept / clock)
