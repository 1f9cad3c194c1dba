"""Process groups and this rank's place in them: the only user of megatron-core's parallel state."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_rb.config.open_files import raise_open_files
from megatron_rb.platform.base import Platform

T = TypeVar("T")
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
"""Linux: differs between machines, is the same in all containers of one."""


@dataclass(frozen=True)
class Place:
    """Degrees of the run and the coordinates of this rank in it."""

    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    vpp_size: int
    dp_rank: int
    """Ranks of one replica have the same samples, and the same number here."""
    dp_size: int
    cp_rank: int = 0
    cp_size: int = 1

    @property
    def name(self) -> str:
        """How this rank is called in messages: `rank 3 (tp 1, pp 1, dp 0)`."""
        context = f", cp {self.cp_rank}" if self.cp_size > 1 else ""
        return f"rank {self.rank} (tp {self.tp_rank}{context}, pp {self.pp_rank}, dp {self.dp_rank})"


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
        dist.init_process_group(platform.collective_backend, rank=rank, world_size=world_size, timeout=timeout)
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


def build_groups(
    tp_size: int, pp_size: int, vpp_size: int, timeout_minutes: float, seed: int, cp_size: int = 1
) -> Place:
    """Create the tensor-, context-, pipeline- and data-parallel groups; `start_process_group` must have run.

    Raises:
        ValueError: the world size is not a multiple of tp_size x cp_size x pp_size.
    """
    world_size, replica = dist.get_world_size(), tp_size * cp_size * pp_size
    if world_size % replica:
        raise ValueError(
            f"{world_size} processes cannot be split into tp_size {tp_size} x pp_size {pp_size} x cp_size {cp_size}; "
            f"start a multiple of {replica}"
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp_size,
        pipeline_model_parallel_size=pp_size,
        virtual_pipeline_model_parallel_size=vpp_size if vpp_size > 1 else None,
        context_parallel_size=cp_size,
        distributed_timeout_minutes=max(1, round(timeout_minutes)),
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return Place(
        rank=dist.get_rank(),
        world_size=world_size,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=tp_size,
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=pp_size,
        vpp_size=vpp_size,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=world_size // replica,
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_size=cp_size,
    )


def destroy_groups() -> None:
    """End the parallel groups, so that another layout can be built in the same processes; every rank must call this."""
    dist.barrier()
    parallel_state.destroy_model_parallel()
    # megatron-core only forgets most of its groups; each keeps threads and sockets until torch destroys it.
    default = dist.group.WORLD
    for group in [group for group in dist.distributed_c10d._world.pg_map if group is not default]:
        dist.destroy_process_group(group)


def tp_group() -> dist.ProcessGroup:
    return parallel_state.get_tensor_model_parallel_group()


def pp_group() -> dist.ProcessGroup:
    return parallel_state.get_pipeline_model_parallel_group()


def cp_group() -> dist.ProcessGroup:
    return parallel_state.get_context_parallel_group()


def dp_cp_rank() -> int:
    """Number of this rank among those that hold the same weights: data- and context-parallel ones."""
    return parallel_state.get_data_parallel_rank(with_context_parallel=True)


def dp_cp_group() -> dist.ProcessGroup:
    """The ranks that hold the same weights, over which gradients are summed: data- and context-parallel ones."""
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def model_parallel_ranks() -> list[int]:
    """Global ranks that together hold one copy of the model."""
    return dist.get_process_group_ranks(parallel_state.get_model_parallel_group())


def replica_group_gloo() -> dist.ProcessGroup:
    """A new group for CPU tensors of the ranks that have the same samples; every rank must call this."""
    replicas = gather_from_all(parallel_state.get_data_parallel_rank())
    mine = None
    for number in sorted(set(replicas)):
        ranks = [rank for rank, replica in enumerate(replicas) if replica == number]
        group = dist.new_group(ranks, backend="gloo")
        if dist.get_rank() in ranks:
            mine = group
    assert mine is not None
    return mine


def last_pp_rank() -> int:
    """Global rank of the last pipeline stage beside this rank."""
    return parallel_state.get_pipeline_model_parallel_last_rank()


def answering_rank(place: Place) -> int:
    """Global rank of the first tensor-parallel rank of the last stage of this rank's copy of the model."""
    return model_parallel_ranks()[(place.pp_size - 1) * place.tp_size]


def pipeline_pair_group(pp_a: int, pp_b: int) -> dist.ProcessGroup | None:
    """A group of the two pipeline ranks `pp_a` and `pp_b` of this rank's pipeline; every rank must call this.

    Returns None on ranks that are in no such pair, and when both are the same rank.
    """
    if pp_a == pp_b:
        return None
    mine = None
    everyone: list[list[int]] = [None] * dist.get_world_size()  # type: ignore[list-item]
    dist.all_gather_object(everyone, dist.get_process_group_ranks(pp_group()))
    seen: set[tuple[int, ...]] = set()
    for ranks in everyone:
        if tuple(ranks) in seen:
            continue
        seen.add(tuple(ranks))
        pair = [ranks[pp_a], ranks[pp_b]]
        group = dist.new_group(pair)
        if dist.get_rank() in pair:
            mine = group
    return mine


def wait_for_all() -> None:
    """Return when every rank of the world has called this."""
    dist.barrier()


def gather_from_all(value: T) -> list[T]:
    """The values of all ranks, by rank; every rank calls this."""
    values: list[T] = [None] * dist.get_world_size()  # type: ignore[list-item]
    dist.all_gather_object(values, value)
    return values


def rank_zero_first(action: Callable[[], T]) -> T:
    """Run an action on rank 0, then on all others; an error of rank 0 is raised everywhere and stops the others."""
    failure: list[Exception | None] = [None]
    value = None
    if dist.get_rank() == 0:
        try:
            value = action()
        except (ValueError, OSError) as error:
            failure[0] = error
    dist.broadcast_object_list(failure, src=0, device=torch.device("cpu"))
    if failure[0] is not None:
        raise failure[0]
    return action() if dist.get_rank() else value  # type: ignore[return-value]


def gather_over(local: torch.Tensor, group: dist.ProcessGroup) -> list[torch.Tensor]:
    """The tensor of all ranks of a group, of the same shape on each."""
    shards = [torch.empty_like(local) for _ in range(group.size())]
    dist.all_gather(shards, local.contiguous(), group=group)
    return shards
