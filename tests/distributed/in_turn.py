"""Layouts one after the other in one world of CPU processes: imports and process groups are what costs time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_rb.app.session import adapt_megatron, session_of
from megatron_rb.config.schema import Config, ModelConfig, ParallelConfig, PlatformConfig
from megatron_rb.launch.job import JobSpec
from megatron_rb.launch.topology import rank_table
from megatron_rb.parallel.mesh import Mesh
from megatron_rb.parallel.session import Session
from megatron_rb.platform import Platform


def adapted_cpu() -> Platform:
    """The CPU with megatron-core adapted to it; to be called before anything imports megatron-core."""
    return adapt_megatron("cpu")


def each_layout(cases: Sequence[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], Session]]:
    """Every case with its session, in groups of its own. A case has `hf`, `layout`, `tp`, `pp`, and may have `cp`."""
    for case in cases:
        config = Config(model=ModelConfig(case["hf"], dtype="fp32"), seed=0)
        config.platform = PlatformConfig("cpu", threads_per_rank=1)
        config.parallel = ParallelConfig(case["tp"], case["pp"], case.get("cp", 1), case["layout"], timeout_minutes=2.0)
        with session_of(config) as session:
            check_ranks(session.mesh)
            yield case, session


def check_ranks(mesh: Mesh) -> None:
    """The launcher's table and the mesh must say of this rank what megatron-core says."""
    from megatron.core import parallel_state as state

    told = {
        "tp": state.get_tensor_model_parallel_rank(),
        "cp": state.get_context_parallel_rank(),
        "dp": state.get_data_parallel_rank(),
        "pp": state.get_pipeline_model_parallel_rank(),
    }
    job = JobSpec("m", (), mesh.world_size, Path(), tp_size=mesh.tp_size, pp_size=mesh.pp_size, cp_size=mesh.cp_size)
    row = rank_table(job, ["here"])[mesh.rank]
    assert told == {axis: getattr(row, f"{axis}_rank") for axis in told}, (told, row)
    assert told == {axis: getattr(mesh, f"{axis}_rank") for axis in told}, (told, mesh)
    assert mesh.dp_cp_rank == state.get_data_parallel_rank(with_context_parallel=True)
    assert mesh.last_pp_rank == state.get_pipeline_model_parallel_last_rank()
    for name, group in mesh.groups.items():
        ranks = list(mesh.grid.group(mesh.rank, *name.split("_")))
        assert dist.get_process_group_ranks(group) == ranks, (name, ranks)


def micro_batches(
    packs: Sequence[Sequence[Any]], session: Session, sequence_parallel: bool, **options: Any
) -> list[Any]:
    """This rank's share of packs of samples; `options` go to `build_micro_batch`."""
    from megatron_rb.models.inputs import build_micro_batch
    from megatron_rb.parity.stack import share_packs

    shape, mesh = session.shape, session.mesh
    share = share_packs(packs, mesh)
    return [
        build_micro_batch(
            share.samples(number),
            shape,
            tp_rank=mesh.tp_rank,
            tp_size=mesh.tp_size,
            sequence_parallel=sequence_parallel,
            cp_rank=mesh.cp_rank,
            cp_size=mesh.cp_size,
            **options,
        )
        for number in share.mine
    ]


def detach_chunks(chunks: Iterable[Any], param_sync: bool) -> None:
    """Take the hooks of overlapped communication off, and wait for all ranks to have done so."""
    for chunk in chunks:
        if getattr(chunk, "remove_forward_pre_hook_handles", None):
            chunk.disable_forward_pre_hook(param_sync=param_sync)
    dist.barrier()
