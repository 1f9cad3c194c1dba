"""Parameter groups of the optimizer: a rank has those of all ranks, also of parts that it holds nothing of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from megatron_rb.config.schema import FreezeConfig
from megatron_rb.models.build import MODEL_PARTS, ModelPart
from megatron_rb.rehearsal.stand_ins import StandIns

PREFIXES: dict[ModelPart, str] = {"vision": "vision.", "merger": "vision.merger.", "language": ""}
"""Of the names of a part's parameters."""


class TrainedParts:
    """Stands for the chunks of all ranks: of every part that is trained a matrix and a vector, without storage."""

    def __init__(self, frozen: FreezeConfig) -> None:
        shapes = {"matrix.weight": (1, 1), "vector.weight": (1,)}
        self._parameters = {
            f"{PREFIXES[part]}{name}": torch.nn.Parameter(torch.empty(shape, device="meta"))
            for part in MODEL_PARTS
            if not getattr(frozen, part)
            for name, shape in shapes.items()
        }

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        yield from self._parameters.items()


def stand_in_for_parameter_groups(stand_ins: StandIns, frozen: FreezeConfig) -> None:
    """megatron-core gathers the keys of the groups from all ranks; one alone would miss those of other stages."""
    from megatron.core import optimizer

    grouped, parts = optimizer._get_param_groups, TrainedParts(frozen)
    absent = {id(parameter) for _, parameter in parts.named_parameters()}

    def groups(chunks: Sequence[torch.nn.Module], *settings: Any, **named: Any) -> list[dict[str, Any]]:
        found = grouped([*chunks, parts], *settings, **named)
        return [group | {"params": [each for each in group["params"] if id(each) not in absent]} for group in found]

    stand_ins.set(optimizer, "_get_param_groups", groups)
