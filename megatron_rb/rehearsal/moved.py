"""What a checkpoint moves, of the rehearsed ranks and of whole machines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

from megatron_rb.layout.mesh import RankGrid
from megatron_rb.rehearsal.records import CheckpointBytes, RehearsedRank

Waits = list[tuple[str, str, int]]
Coordinates = tuple[int, int, int]


@dataclass(frozen=True)
class CheckpointSummary:
    """A checkpoint of a run."""

    rank: CheckpointBytes
    """The most of any rehearsed rank, each figure for itself."""
    node: CheckpointBytes
    """The most of any machine; ranks that were not rehearsed move what the most loaded of their class does."""
    world: CheckpointBytes
    """Of all ranks, counted in the same way."""
    waits: dict[str, Waits]
    """By phase, of the rank with the most: kind, line and number."""


def summarise_checkpoint(
    records: Sequence[RehearsedRank], grid: RankGrid, devices_per_node: int
) -> CheckpointSummary | None:
    """None when no rank has saved and loaded one."""
    found = {record.rank: record.checkpoint for record in records if record.checkpoint is not None}
    if not found:
        return None
    classes = _classes(found, grid)
    ranks = [
        found.get(rank) or classes.get(_class(grid, rank), CheckpointBytes(0, 0, 0)) for rank in range(grid.world_size)
    ]
    nodes = [_added(ranks[first : first + devices_per_node]) for first in range(0, len(ranks), devices_per_node)]
    waits = {phase: _most_waits(records, phase) for phase in ("save", "load")}
    return CheckpointSummary(_most(found.values()), _most(nodes), _added(ranks), waits)


def _classes(found: Mapping[int, CheckpointBytes], grid: RankGrid) -> dict[Coordinates, CheckpointBytes]:
    """The most of the ranks of every class: those that differ by their copy of the model alone."""
    members: dict[Coordinates, list[CheckpointBytes]] = {}
    for rank, moved in found.items():
        members.setdefault(_class(grid, rank), []).append(moved)
    return {key: _most(each) for key, each in members.items()}


def _class(grid: RankGrid, rank: int) -> Coordinates:
    at = grid.coordinates(rank)
    return at.pp, at.tp, at.cp


def _most(moved: Iterable[CheckpointBytes]) -> CheckpointBytes:
    each = list(moved)
    return CheckpointBytes(*(max(getattr(one, field.name) for one in each) for field in fields(CheckpointBytes)))


def _added(moved: Iterable[CheckpointBytes]) -> CheckpointBytes:
    each = list(moved)
    return CheckpointBytes(*(sum(getattr(one, field.name) for one in each) for field in fields(CheckpointBytes)))


def _most_waits(records: Sequence[RehearsedRank], name: str) -> Waits:
    waits = [phase.waits for record in records for phase in record.phases if phase.name == name]
    return max(waits, key=lambda each: sum(count for _, _, count in each), default=[])
