"""Makes and ends the process groups of a mesh: the only user of megatron-core's parallel state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_rb.layout.mesh import RankGrid
from megatron_rb.parallel.mesh import Mesh


def build_mesh(
    grid: RankGrid, vpp_size: int, timeout_minutes: float, seed: int, device_backend: str | None = None
) -> Mesh:
    """Create the tensor-, context-, pipeline- and data-parallel groups; the world must have been joined.

    megatron-core keeps them too, in a state of the process: `destroy_groups` before another mesh is built.

    Args:
        device_backend: as `Platform.device_backend`.
    """
    with _lean_groups(device_backend):
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=grid.tp_size,
            pipeline_model_parallel_size=grid.pp_size,
            virtual_pipeline_model_parallel_size=vpp_size if vpp_size > 1 else None,
            context_parallel_size=grid.cp_size,
            distributed_timeout_minutes=max(1, round(timeout_minutes)),
            create_gloo_process_groups=False,  # no CPU tensor travels between copies of the model
        )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    groups = {
        "tp": parallel_state.get_tensor_model_parallel_group(),
        "cp": parallel_state.get_context_parallel_group(),
        "pp": parallel_state.get_pipeline_model_parallel_group(),
        "dp_cp": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    return Mesh(grid, dist.get_rank(), vpp_size, groups, device_backend)


@contextmanager
def _lean_groups(device_backend: str | None) -> Iterator[None]:
    """Let megatron-core make groups over the device's backend alone, and groups of the same ranks once.

    It names no backend, and torch then gives every group those of the world: one with 256 members would hold 255
    sockets for CPU tensors that nobody sends. Those of experts repeat the ranks of others, and so do those of axes of
    size 1; on the host each would have threads and sockets too.
    """
    make, made = dist.new_group, dict[tuple[tuple[int, ...], str | None], Any]()

    def new_group(ranks: Sequence[int], backend: str | None = None, **options: Any) -> Any:
        key = (tuple(ranks), backend)
        if key not in made:
            made[key] = make(ranks=ranks, backend=backend or device_backend, **options)
        return made[key]

    stand_in: Any = new_group
    dist.new_group = stand_in
    try:
        yield
    finally:
        dist.new_group = make


def destroy_groups() -> None:
    """End the parallel groups, so that another mesh can be built in the same processes; every rank must call this."""
    dist.barrier()
    parallel_state.destroy_model_parallel()
    # megatron-core only forgets most of its groups; each keeps threads and sockets until torch destroys it.
    default = dist.group.WORLD
    for group in [group for group in dist.distributed_c10d._world.pg_map if group is not default]:
        dist.destroy_process_group(group)


def replica_group_gloo(mesh: Mesh) -> dist.ProcessGroup:
    """A new group for CPU tensors of the ranks that have the same samples; every rank must call this."""
    group = _own_group(mesh.grid.groups("tp", "cp", "pp"), backend="gloo")
    assert group is not None
    return group


def pipeline_pair_group(mesh: Mesh, pp_a: int, pp_b: int) -> dist.ProcessGroup | None:
    """A group of the two pipeline ranks `pp_a` and `pp_b` of this rank's pipeline; every rank must call this.

    Returns None on ranks that are in no such pair, and when both are the same rank.
    """
    if pp_a == pp_b:
        return None
    return _own_group([(ranks[pp_a], ranks[pp_b]) for ranks in mesh.grid.groups("pp")], mesh.device_backend)


def _own_group(groups: Sequence[Sequence[int]], backend: str | None = None) -> dist.ProcessGroup | None:
    """Create groups that share no rank; the one of this rank, or None."""
    mine = None
    for ranks in groups:
        group = dist.new_group(list(ranks), backend=backend)
        if dist.get_rank() in ranks:
            mine = group
    return mine
