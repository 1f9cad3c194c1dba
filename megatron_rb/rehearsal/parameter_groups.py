"""Parameter groups of the optimizer: a rank has those of all ranks, also of parts that it holds nothing of."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch

from megatron_rb.checkpoint.hf.in_full import trained_in_full
from megatron_rb.checkpoint.hf.run_adapters import adapters_of_run
from megatron_rb.checkpoint.hf.table import weight_table
from megatron_rb.config.schema import ModelConfig
from megatron_rb.models.adapters.plan import adapted
from megatron_rb.models.build import MODEL_PARTS, ModelPart, part_of
from megatron_rb.rehearsal.stand_ins import StandIns
from megatron_rb.shapes.linears import linears
from megatron_rb.shapes.shape import load_shape

PREFIXES: dict[ModelPart, str] = {"vision": "vision.", "merger": "vision.merger.", "language": ""}
"""Of the names of a part's parameters."""


Kind = tuple[ModelPart, bool]
"""A part of the model, and whether its parameters are matrices."""


def trained_kinds(model: ModelConfig) -> set[Kind]:
    """What some rank of a run trains."""
    if not model.adapters:
        return {(part, matrix) for part in MODEL_PARTS if not getattr(model.freeze, part) for matrix in (True, False)}
    shape = load_shape(model.hf_path)
    adapters, table = adapters_of_run(model, shape), weight_table(shape)
    factors = {
        (part_of(linear.name), True)
        for linear in linears(shape)
        if any(adapted(adapter, linear) for adapter in adapters)
    }
    in_full = trained_in_full(model.train_in_full, shape)
    return factors | {(part_of(name), len(table[name].shape) > 1) for name in in_full}


class TrainedParts:
    """Stands for the chunks of all ranks: of every part that is trained a matrix and a vector, without storage."""

    def __init__(self, kinds: Collection[Kind]) -> None:
        self._parameters = {
            f"{PREFIXES[part]}{'matrix' if matrix else 'vector'}.weight": torch.nn.Parameter(
                torch.empty((1, 1) if matrix else (1,), device="meta")
            )
            for part, matrix in sorted(kinds)
        }

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        yield from self._parameters.items()


def stand_in_for_parameter_groups(stand_ins: StandIns, model: ModelConfig) -> None:
    """megatron-core gathers the keys of the groups from all ranks; one alone would miss those of other stages."""
    from megatron.core import optimizer

    grouped, parts = optimizer._get_param_groups, TrainedParts(trained_kinds(model))
    absent = {id(parameter) for _, parameter in parts.named_parameters()}

    def groups(chunks: Sequence[torch.nn.Module], *settings: Any, **named: Any) -> list[dict[str, Any]]:
        found = grouped([*chunks, parts], *settings, **named)
        return [group | {"params": [each for each in group["params"] if id(each) not in absent]} for group in found]

    stand_ins.set(optimizer, "_get_param_groups", groups)
