"""The world of processes as the environment tells it, and the joining of it; knows nothing of megatron-core."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_rb.config.open_files import raise_open_files
from megatron_rb.parallel.store import agent_keeps_store, join_store
from megatron_rb.platform.base import Platform

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
"""Linux: differs between machines, is the same in all containers of one."""


def world_from_environment() -> tuple[int, int, int]:
    """(rank, local rank, world size) as torchrun or srun state them; a lone process is rank 0 of 1."""
    env = os.environ
    rank = int(env.get("RANK", env.get("SLURM_PROCID", "0")))
    local_rank = int(env.get("LOCAL_RANK", env.get("SLURM_LOCALID", "0")))
    world_size = int(env.get("WORLD_SIZE", env.get("SLURM_NTASKS", "1")))
    return rank, local_rank, world_size


def cpu_threads_of_rank(threads_per_rank: int) -> int:
    """Intra-op threads of this process: as configured, else OMP_NUM_THREADS, else its share of the cores."""
    if threads_per_rank > 0:
        return threads_per_rank
    env = os.environ
    # A number per level of nesting is allowed; the first is meant.
    wanted = env.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if wanted.isdecimal() and int(wanted) > 0:
        return int(wanted)
    ranks_here = int(env.get("LOCAL_WORLD_SIZE", env.get("SLURM_NTASKS_PER_NODE", env.get("WORLD_SIZE", "1"))))
    return max(
        1, (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1) // ranks_here
    )


def start_process_group(platform: Platform, timeout_minutes: float) -> None:
    """Join the world named by the environment; a lone process makes a world of one on a free local port."""
    if dist.is_initialized():
        return
    rank, local_rank, world_size = world_from_environment()
    platform.set_device(local_rank)
    raise_open_files()
    for name, value in platform.collective_environment.items():
        os.environ.setdefault(name, value)
    timeout = timedelta(minutes=timeout_minutes)
    if "MASTER_ADDR" in os.environ:
        ours = None if agent_keeps_store() else join_store(rank, timeout)
        dist.init_process_group(
            platform.collective_backend, store=ours, rank=rank, world_size=world_size, timeout=timeout
        )
        _check_own_device(platform, local_rank)
        return
    if world_size > 1:
        raise ValueError(f"WORLD_SIZE is {world_size} but MASTER_ADDR is not set; start with `rb launch` or torchrun")
    store = dist.TCPStore("127.0.0.1", 0, 1, True, timeout=timeout)
    dist.init_process_group(platform.collective_backend, store=store, rank=0, world_size=1, timeout=timeout)


def _check_own_device(platform: Platform, local_rank: int) -> None:
    """Two ranks of a machine on one device would fail in their first collective, or share its memory.

    Every rank tells its device; those that see one alone look at the lower local ranks of their machine.

    Raises:
        ValueError: another rank has the same device.
    """
    device = platform.device_identity()
    if not device:
        return
    store = dist.distributed_c10d._get_default_store()
    machine = f"device/{socket.gethostname()}/{BOOT_ID.read_text().strip() if BOOT_ID.is_file() else ''}"
    store.set(f"{machine}/{local_rank}", device)
    others = range(local_rank) if platform.device_count() == 1 else range(0)
    same = [other for other in others if store.get(f"{machine}/{other}").decode() == device]
    if same:
        raise ValueError(
            f"local ranks {same[0]} and {local_rank} of {socket.gethostname()} see one and the same {platform.name} "
            f"device ({device}); give every task its own (srun --gpus-per-task=1), let all tasks see all devices of "
            f"the machine, or start fewer processes on it"
        )


def connect_devices(platform: Platform) -> None:
    """Sum one number over the devices of the world; every rank calls this.

    A broken link shows here, before anything is loaded, and the communicator of the world is made. `device_id` of
    `init_process_group` would do that too, but torch then splits every later group off that communicator, with all
    ranks in each split (`new_group`: thousands at 1,024 ranks), and connects groups that no step uses.
    """
    if platform.device_backend is None:
        return
    dist.all_reduce(torch.ones(1, device=platform.current_device()))
    platform.synchronize()


def leave_world() -> None:
    """Wait for all ranks, then end the process group and every group in it."""
    dist.barrier()
    dist.destroy_process_group()
