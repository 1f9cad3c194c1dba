"""Puts adapters beside the linears of the stages of a rank, and says which weights are trained then."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence

import torch

from megatron_rb.models.adapters.lora import LoraUpdate, LoraUpdates, add_updates
from megatron_rb.models.adapters.plan import Adapter, adapted
from megatron_rb.models.layers import has_split_rows
from megatron_rb.models.stage import RoboBrainStage
from megatron_rb.shapes.linears import linears

FACTORS = (".lora_A", ".lora_B")
"""How the names of factors end."""


def is_factor(name: str) -> bool:
    """Whether a parameter is one of an adapter, by its global name."""
    return name.endswith(FACTORS)


def attach_adapters(stages: Sequence[RoboBrainStage], adapters: Sequence[Adapter], device: torch.device) -> None:
    """Give the linears of this rank their factors, without values yet."""
    by_name = {linear.name: linear for linear in linears(stages[0].shape)}
    for stage in stages:
        for name, module in list(stage.named_modules()):
            linear = by_name.get(name)
            if linear is None:
                continue
            with torch.device(device):
                updates = {
                    adapter.name: LoraUpdate(
                        adapter,
                        linear,
                        stage.shape.text.num_query_groups,
                        stage.mesh.tp_size,
                        has_split_rows(module),
                        stage.config.params_dtype,
                    )
                    for adapter in adapters
                    if adapted(adapter, linear)
                }
            if updates:
                add_updates(module, LoraUpdates(updates))


def fresh_factors(shapes: dict[str, tuple[int, ...]], seed: int) -> Callable[[str], torch.Tensor]:
    """First values of full factors by name, the same for every layout: as peft draws them, the second ones zero."""

    def read(name: str) -> torch.Tensor:
        size = shapes[name]
        if name.endswith(FACTORS[1]):
            return torch.zeros(size)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
        # kaiming_uniform_ with a = sqrt(5), as torch draws the weight of a linear.
        return (2 * torch.rand(size, generator=generator) - 1) / math.sqrt(size[1])

    return read
