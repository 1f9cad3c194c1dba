"""Case for test_open_files: files and groups of every rank, before and after collectives in all of its groups."""

from __future__ import annotations

import os
import resource
from typing import Any

from megatron_rb.platform import get_platform
from megatron_rb.platform.mcore_shims import install_mcore_shims


def open_files(layouts: list[tuple[int, int, int]], lazy: bool, soft_limit: int) -> dict[str, Any]:
    """Per (tp, pp, cp) the sizes of the groups of this rank and the files that they hold."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft_limit, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    platform = get_platform("cpu")
    install_mcore_shims(platform)
    import torch
    import torch.distributed as dist

    from megatron_rb.layout.mesh import RankGrid
    from megatron_rb.parallel.groups import build_mesh, destroy_groups
    from megatron_rb.parallel.world import start_process_group

    if lazy:
        type(platform).collective_environment = {"TORCH_GLOO_LAZY_INIT": "1"}
    before = _count()
    start_process_group(platform, timeout_minutes=2)
    limit, found = resource.getrlimit(resource.RLIMIT_NOFILE), []
    for tp, pp, cp in layouts:
        build_mesh(RankGrid.of_world(dist.get_world_size(), tp, pp, cp), 1, 2, 0)
        mine = list(dist.distributed_c10d._world.pg_map)
        for group in mine:
            dist.all_reduce(torch.ones(1), group=group)
            dist.broadcast(torch.ones(1), group=group, group_src=0)
            dist.barrier(group=group)
        found.append((sorted(group.size() for group in mine), _count() - before))
        destroy_groups()
    return {"limit": limit, "found": found}


def _count() -> int:
    return len(os.listdir("/proc/self/fd"))
