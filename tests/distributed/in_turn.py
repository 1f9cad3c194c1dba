"""Layouts one after the other in one world of CPU processes: imports and process groups are what costs time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
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
    """Every case with its shape, layout and place, in groups of its own. A case has `hf`, `layout`, `tp` and `pp`."""
    from megatron_rb.layout import parse_layout
    from megatron_rb.models.robobrain.config import load_shape
    from megatron_rb.parallel.groups import build_groups, destroy_groups, start_process_group

    start_process_group(platform, 2.0)
    for case in cases:
        shape = load_shape(case["hf"])
        layout = parse_layout(case["layout"], shape.vision.num_layers, shape.text.num_layers, case["pp"])
        yield case, shape, layout, build_groups(case["tp"], case["pp"], layout.vpp_size, 2.0, seed=0)
        destroy_groups()


def micro_batches(packs: Sequence[Sequence[Any]], shape, place, sequence_parallel: bool, **options: Any) -> list[Any]:
    """This rank's share of packs of samples; `options` go to `build_micro_batch`."""
    from megatron_rb.evaluation.parity import share_packs
    from megatron_rb.models.robobrain.inputs import build_micro_batch

    share = share_packs(packs, place)
    return [
        build_micro_batch(
            share.samples(number), shape, tp_rank=place.tp_rank, tp_size=place.tp_size,
            sequence_parallel=sequence_parallel, **options,
        )
        for number in share.mine
    ]  # fmt: skip


def detach_chunks(chunks: Iterable[Any], param_sync: bool) -> None:
    """Take the hooks of overlapped communication off, and wait for all ranks to have done so."""
    for chunk in chunks:
        if getattr(chunk, "remove_forward_pre_hook_handles", None):
            chunk.disable_forward_pre_hook(param_sync=param_sync)
    dist.barrier()
