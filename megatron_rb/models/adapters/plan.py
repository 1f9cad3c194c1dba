"""Which linears of a model get which low-rank factors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_rb.config.schema import AdapterConfig
from megatron_rb.shapes.linears import ModelLinear, linears
from megatron_rb.shapes.patterns import matching, nearest
from megatron_rb.shapes.shape import RoboBrainShape

NOT_ADAPTED = ("lm_head", "embed_tokens", "patch_embed.proj", "pos_embed")
"""Modules with matrices that are no linears of layers."""


@dataclass(frozen=True)
class Adapter:
    """One adapter: its settings and the modules of transformers that it changes."""

    name: str
    modules: frozenset[str]
    rank: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False

    @property
    def scale(self) -> float:
        """Factor on the product of its factors."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def adapters_of(settings: Mapping[str, AdapterConfig], shape: RoboBrainShape) -> tuple[Adapter, ...]:
    """The adapters that settings ask for.

    Raises:
        ValueError: a pattern means no linear.
    """
    names = [module.name for linear in linears(shape) for module in linear.modules]
    return tuple(
        Adapter(
            name,
            frozenset(_chosen(f"model.adapters.{name}.patterns", each.patterns, names)),
            each.rank,
            each.alpha,
            each.dropout,
            each.rslora,
        )
        for name, each in settings.items()
    )


def _chosen(setting: str, patterns: Sequence[str], names: Sequence[str]) -> set[str]:
    chosen: set[str] = set()
    for pattern in patterns:
        found = matching(pattern, names)
        if not found and matching(pattern, NOT_ADAPTED):
            raise ValueError(
                f"{setting}: {pattern} takes no low-rank factors; train it in full with model.train_in_full=[{pattern}]"
            )
        if not found:
            raise ValueError(
                f"{setting}: '{pattern}' is no linear of this model; did you mean {', '.join(nearest(pattern, names))}?"
            )
        chosen.update(found)
    return chosen


def adapted(adapter: Adapter, linear: ModelLinear) -> list[int]:
    """Which of the modules that a linear is made of an adapter changes."""
    return [number for number, module in enumerate(linear.modules) if module.name in adapter.modules]


def factor_elements(adapter: Adapter, linear: ModelLinear) -> tuple[int, int]:
    """Elements of all first and of all second factors beside a linear."""
    modules = [linear.modules[number] for number in adapted(adapter, linear)]
    return adapter.rank * linear.inputs * len(modules), adapter.rank * sum(module.outputs for module in modules)
