"""A process of `rb doctor`: one per device. Checks its machine, then how fast machines exchange data, and prints it."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_rb.parallel.world import start_process_group, world_from_environment
from megatron_rb.platform import Platform, get_platform
from megatron_rb.platform.health import machine_report

BYTES = {"cpu": 1 << 22}
REPEATS = 3
REPORT = "rb-doctor "
"""Begins the one line that is read."""


def main(argv: Sequence[str]) -> int:
    """Args: platform, folder whose disk is looked at, port to try (0 = none)."""
    platform = get_platform(argv[0])
    rank, local_rank, world_size = world_from_environment()
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    start_process_group(platform, timeout_minutes=3)
    report = machine_report(platform, argv[1], int(argv[2])) if local_rank == 0 else {}
    if local_rank == 0 and platform.device_identity() and platform.device_count() == 1:
        report["devices"] = per_node  # each process sees its own alone
    report["within"] = _bandwidth(platform, _group_of_node(platform, rank, per_node)) if per_node > 1 else None
    report["pairs"] = _between_nodes(platform, rank, per_node, world_size)
    everyone: list[dict[str, Any]] = [{}] * world_size
    dist.all_gather_object(everyone, report)
    if rank == 0:
        print(REPORT + json.dumps(everyone[::per_node]), flush=True)
    dist.destroy_process_group()
    return 0


def _group_of_node(platform: Platform, rank: int, per_node: int) -> dist.ProcessGroup:
    mine = None
    for first in range(0, dist.get_world_size(), per_node):
        group = dist.new_group(list(range(first, first + per_node)), backend=platform.device_backend)
        mine = group if first <= rank < first + per_node else mine
    assert mine is not None
    return mine


def _between_nodes(platform: Platform, rank: int, per_node: int, world_size: int) -> dict[int, float]:
    """GB/s between this node and every other by number; in each round every node is in one pair at most."""
    nodes, found = world_size // per_node, {}
    for pairs in _rounds(nodes):
        for one, other in pairs:
            group = dist.new_group([one * per_node, other * per_node], backend=platform.device_backend)
            if rank in (one * per_node, other * per_node):
                found[other if rank == one * per_node else one] = _bandwidth(platform, group)
        dist.barrier()
    return found


def _rounds(nodes: int) -> list[list[tuple[int, int]]]:
    """Neighbours in a ring, in two or three rounds: every node is measured against two others."""
    ring = [(node, (node + 1) % nodes) for node in range(nodes)] if nodes > 2 else [(0, 1)] * (nodes - 1)
    return [[pair for number, pair in enumerate(ring) if _color(number, nodes) == color] for color in range(3)]


def _color(number: int, nodes: int) -> int:
    return 2 if nodes % 2 and number == nodes - 1 else number % 2


def _bandwidth(platform: Platform, group: dist.ProcessGroup) -> float:
    """Algorithm bandwidth of an all-reduce in GB/s, the best of some tries."""
    size = BYTES.get(platform.device_type, 1 << 28)
    values = torch.ones(size // 4, device=platform.current_device())
    dist.all_reduce(values, group=group)
    best = float("inf")
    for _ in range(REPEATS):
        platform.synchronize()
        start = time.perf_counter()
        dist.all_reduce(values, group=group)
        platform.synchronize()
        best = min(best, time.perf_counter() - start)
    return round(size / best / 1e9, 3)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
