"""Which rank holds the others up: its time in each section of a step beside that of ranks with the same work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low

SECTIONS = ("data", "vision", "language", "wait")
"""Waiting for data; forward passes of the vision and of the language blocks; waiting for the others at the end."""

RATIO, SHARE = 1.3, 0.05
"""A rank stands out at so many times the median of its peers, when the difference is so large a part of the step."""


@dataclass(frozen=True)
class RankTimes:
    """Seconds of one rank in one step."""

    rank: int
    peers: int
    """Equal for ranks that do the same work (those of one pipeline stage)."""
    sections: Mapping[str, float]


@dataclass(frozen=True)
class Straggler:
    rank: int
    section: str
    ratio: float
    """Its time over the median of its peers."""

    def __str__(self) -> str:
        return f"rank {self.rank} in {self.section} ({self.ratio:.1f} x its peers)"


@dataclass(frozen=True)
class RankRecord:
    """The times of all ranks in one step."""

    step: int
    seconds: float
    """Wall clock of the step."""
    ranks: Sequence[RankTimes]

    def straggler(self) -> Straggler | None:
        """The rank that loses most time against its peers; None when none stands out, or has peers."""
        found: list[tuple[float, Straggler]] = []
        for own in self.ranks:
            peers = [times for times in self.ranks if times.peers == own.peers]
            for section in SECTIONS[:-1]:  # who waits at the end is not slow
                usual = median_low(times.sections[section] for times in peers)
                lost = own.sections[section] - usual
                if lost > SHARE * self.seconds and own.sections[section] > RATIO * usual:
                    ratio = own.sections[section] / usual if usual > 0 else float("inf")
                    found.append((lost, Straggler(own.rank, section, ratio)))
        return max(found, key=lambda item: item[0])[1] if found else None
