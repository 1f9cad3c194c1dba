"""Which machine gets which ranks: tensor parallelism inside a machine, neighbours below one leaf switch."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from megatron_rb.launch.job import JobSpec
from megatron_rb.layout.mesh import RankGrid


@dataclass(frozen=True)
class RankPlace:
    """Where a rank runs and what it does in the parallel grid."""

    rank: int
    node: str
    local_rank: int
    tp_rank: int
    cp_rank: int
    dp_rank: int
    pp_rank: int


def leaf_of_nodes(topology: str, expand: Callable[[str], Sequence[str]]) -> dict[str, str]:
    """Leaf switch by node, from the text of `scontrol show topology`; empty where the cluster has no tree.

    Args:
        expand: turns `node[1-3]` into names.
    """
    leaves: dict[str, str] = {}
    for line in topology.splitlines():
        words = dict(re.findall(r"(\w+)=(\S*)", line))
        if words.get("Level") == "0" and "SwitchName" in words:
            leaves.update({node: words["SwitchName"] for node in expand(words.get("Nodes", ""))})
    return leaves


def choose_nodes(nodes: Sequence[str], count: int, leaves: Mapping[str, str]) -> tuple[str, ...]:
    """`count` of the nodes, below as few leaf switches as possible and one switch after the other."""
    groups: dict[str, list[str]] = {}
    for node in nodes:
        groups.setdefault(leaves.get(node, ""), []).append(node)
    # Full switches first: the spare nodes are left over where a switch is split anyway.
    ordered = sorted(groups.values(), key=len, reverse=True)
    return tuple([node for group in ordered for node in group][:count])


def rank_table(job: JobSpec, nodes: Sequence[str]) -> tuple[RankPlace, ...]:
    """One row per rank, on the machines in their order."""
    grid = RankGrid.of_world(job.world_size, job.tp_size, job.pp_size, job.cp_size)
    return tuple(_row(rank, nodes[rank // job.processes], job, grid) for rank in range(job.world_size))


def _row(rank: int, node: str, job: JobSpec, grid: RankGrid) -> RankPlace:
    at = grid.coordinates(rank)
    return RankPlace(rank, node, rank % job.processes, tp_rank=at.tp, cp_rank=at.cp, dp_rank=at.dp, pp_rank=at.pp)


def table_text(places: Sequence[RankPlace]) -> str:
    """The rank table as text columns."""
    rows: list[tuple[str, ...]] = [("rank", "node", "local_rank", "tp", "cp", "dp", "pp")]
    rows += [
        tuple(map(str, (p.rank, p.node, p.local_rank, p.tp_rank, p.cp_rank, p.dp_rank, p.pp_rank))) for p in places
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return (
        "\n".join(
            "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip() for row in rows
        )
        + "\n"
    )
