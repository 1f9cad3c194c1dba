"""Layouts one after the other in one world of CPU processes: imports and process groups are what costs time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_rb.platform import Platform, get_platform
from megatron_rb.platform.mcore_shims import install_mcore_shims


def adapted_cpu() -> Platform:
    """The CPU with megatron-core adapted to it; to be called before anything imports megatron-core."""
    platform = get_platform("cpu")
    install_mcore_shims(platform)
    return platform


def each_layout(cases: Sequence[dict[str, Any]], platform: Platform) -> Iterator[tuple[dict[str, Any], Any, Any, Any]]:
    """Every case with its shape, layout and place, in groups of its own. A case has `hf`, `layout`, `tp` and `pp`, and
    may have `cp`. The launcher's table of ranks must say of this one what megatron-core says."""
    from megatron_rb.launch.job import JobSpec
    from megatron_rb.launch.topology import rank_table
    from megatron_rb.layout import parse_layout
    from megatron_rb.parallel.groups import build_groups, destroy_groups, start_process_group
    from megatron_rb.shapes.shape import load_shape

    start_process_group(platform, 2.0)
    for case in cases:
        shape = load_shape(case["hf"])
        layout = parse_layout(case["layout"], shape.vision.num_layers, shape.text.num_layers, case["pp"])
        place = build_groups(case["tp"], case["pp"], layout.vpp_size, 2.0, 0, case.get("cp", 1))
        job = JobSpec("m", (), place.world_size, Path(), tp_size=case["tp"], pp_size=case["pp"], cp_size=place.cp_size)
        told = rank_table(job, ["here"])[place.rank]
        for name in ("tp_rank", "cp_rank", "dp_rank", "pp_rank"):
            assert getattr(told, name) == getattr(place, name), (name, told, place)
        yield case, shape, layout, place
        destroy_groups()


def micro_batches(packs: Sequence[Sequence[Any]], shape, place, sequence_parallel: bool, **options: Any) -> list[Any]:
    """This rank's share of packs of samples; `options` go to `build_micro_batch`."""
    from megatron_rb.models.inputs import build_micro_batch
    from megatron_rb.parity.stack import share_packs

    share = share_packs(packs, place)
    return [
        build_micro_batch(
            share.samples(number),
            shape,
            tp_rank=place.tp_rank,
            tp_size=place.tp_size,
            sequence_parallel=sequence_parallel,
            cp_rank=place.cp_rank,
            cp_size=place.cp_size,
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
