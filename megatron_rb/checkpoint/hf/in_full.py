"""Modules of transformers that are trained in full beside adapters, and the parameters that they are here."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_rb.checkpoint.hf.table import EMBEDDING, HEAD, weight_table
from megatron_rb.shapes.patterns import matching, nearest
from megatron_rb.shapes.shape import RoboBrainShape


def trained_in_full(patterns: Sequence[str], shape: RoboBrainShape) -> frozenset[str]:
    """Names of the parameters, as they are stored, of the modules that patterns mean.

    Raises:
        ValueError: a pattern means no module, or a part of what is one tensor here.
    """
    table = weight_table(shape)
    modules = sorted({module for rule in table.values() for name in rule.hf_names for module in _modules_of(name)})
    chosen: set[str] = set()
    for pattern in patterns:
        found = matching(pattern, modules)
        if not found:
            names = ", ".join(nearest(pattern, modules))
            raise ValueError(f"model.train_in_full: '{pattern}' is no module of this model; did you mean {names}?")
        chosen.update(found)
    trained = set()
    for name, rule in table.items():
        named = [source for source in rule.hf_names if chosen & set(_modules_of(source))]
        if named and len(named) < len(rule.hf_names):
            others = ", ".join(source for source in rule.hf_names if source not in named)
            raise ValueError(f"model.train_in_full: {named[0]} is one tensor here with {others}; name all of them")
        if named:
            trained.add(EMBEDDING if shape.text.tied_embeddings and name == HEAD else name)
    return frozenset(trained)


def _modules_of(name: str) -> list[str]:
    """The module of a tensor and all modules around it."""
    words = name.split(".")
    return [".".join(words[:count]) for count in range(1, len(words))]
