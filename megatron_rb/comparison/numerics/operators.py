"""The operators of every block, in the order in which they run, with the definitions that they are held to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from megatron_rb.comparison.numerics import definitions
from megatron_rb.comparison.numerics.definitions import BlockView, Residual

Definition = Callable[[BlockView], Residual | None]


@dataclass(frozen=True)
class Operator:
    """An operator of a block."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    residual: Definition | None = None
    """None (or a result of None): it cannot be computed again from what was kept."""


RECEIVE = Operator("receive", (), ("input",), definitions.received)
"""What hands a block its input: the stage before, or the step from all rows to the labels."""


def operators_of(block: str) -> tuple[Operator, ...]:
    """The operators of a block in the order in which they run."""
    if ".layers." in block:
        return _layer_operators(block.startswith("vision."))
    if block.startswith(("vision.merger", "vision.deepstack")):
        return (
            RECEIVE,
            _norm("norm", "input", "norm", "norm"),
            _linear("fc1", "norm", "fc1", "linear_fc1"),
            Operator("activation", ("fc1",), ("activation",), definitions.activation),
            _linear("fc2", "activation", "output", "linear_fc2", sums_over_ranks=True),
        )
    if block == "language.head":
        return RECEIVE, _norm("norm", "input", "norm", "norm")
    return (Operator(block.rsplit(".", 1)[-1], (), ("output",)),)


def _layer_operators(vision: bool) -> tuple[Operator, ...]:
    first, second = ("norm1", "norm2") if vision else ("input_norm", "post_attention_norm")
    return (
        RECEIVE,
        _norm("norm1", "input", "norm1", first),
        _linear("qkv", "norm1", "qkv", "attention.linear_qkv"),
        Operator("rotary", ("qkv",), ("q", "k", "v"), definitions.rotary),
        Operator("attention", ("q", "k", "v", "qkv"), ("attention",), definitions.attention),
        _linear("proj", "attention", "proj", "attention.linear_proj", sums_over_ranks=True),
        _sum("add 1", "input", "proj", "residual"),
        _norm("norm2", "residual", "norm2", second),
        _linear("fc1", "norm2", "fc1", "mlp.linear_fc1"),
        Operator("activation", ("fc1",), ("activation",), definitions.activation),
        _linear("fc2", "activation", "fc2", "mlp.linear_fc2", sums_over_ranks=True),
        _sum("add 2", "residual", "fc2", "output"),
    )


def _norm(name: str, source: str, target: str, module: str) -> Operator:
    return Operator(name, (source,), (target,), partial(definitions.norm, source=source, target=target, module=module))


def _linear(name: str, source: str, target: str, module: str, sums_over_ranks: bool = False) -> Operator:
    definition = partial(
        definitions.linear, source=source, target=target, module=module, sums_over_ranks=sums_over_ranks
    )
    return Operator(name, (source,), (target,), definition)


def _sum(name: str, left: str, right: str, target: str) -> Operator:
    return Operator(name, (left, right), (target,), partial(definitions.sum_of, left=left, right=right, target=target))
