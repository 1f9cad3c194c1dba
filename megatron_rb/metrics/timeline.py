"""When each pipeline stage computed within a step, and how long it did not: pure arithmetic on timestamps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """One forward or backward pass of one micro-batch through one model chunk."""

    kind: str
    """`forward` or `backward`."""
    start: float
    """Seconds after a moment that all ranks share."""
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(frozen=True)
class StageTimeline:
    """What one rank computed in one step."""

    rank: int
    pp_rank: int
    pipeline: int
    """Number of the model copy: stages of one pipeline wait for each other alone."""
    spans: tuple[Span, ...]

    def busy(self, kind: str = "") -> float:
        """Seconds of computing, of one kind or of both."""
        return sum(span.seconds for span in self.spans if not kind or span.kind == kind)


def bubble_ratios(stages: Sequence[StageTimeline]) -> dict[int, float]:
    """For each rank the share of its pipeline's pass in which it computed neither forward nor backward, 0..1.

    The pass of a pipeline goes from the first start to the last end over its stages. Waiting for another stage and
    sending to it both count as not computing.

    Raises:
        ValueError: a pipeline computed nothing.
    """
    ratios: dict[int, float] = {}
    for number in {stage.pipeline for stage in stages}:
        own = [stage for stage in stages if stage.pipeline == number]
        length = pass_seconds(own)
        if length <= 0:
            raise ValueError(f"pipeline {number} has no forward or backward pass to measure")
        ratios |= {stage.rank: 1 - stage.busy() / length for stage in own}
    return ratios


def pass_seconds(stages: Sequence[StageTimeline]) -> float:
    """From the first start to the last end over some stages; 0 when there is none."""
    spans = [span for stage in stages for span in stage.spans]
    return max(span.end for span in spans) - min(span.start for span in spans) if spans else 0.0
