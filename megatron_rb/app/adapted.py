"""Adapters and what is trained in full beside them, as the planner counts it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from megatron_rb.checkpoint.hf.in_full import trained_in_full
from megatron_rb.checkpoint.hf.run_adapters import adapters_of_run
from megatron_rb.checkpoint.hf.table import EMBEDDING, HEAD, weight_table
from megatron_rb.config.schema import ModelConfig
from megatron_rb.models.adapters.plan import Adapter, adapted, factor_elements
from megatron_rb.planner.trained import Adapted, PartFactors
from megatron_rb.planner.work import PARTS, Part, part_counts
from megatron_rb.shapes.linears import LinearCut, ModelLinear, linears
from megatron_rb.shapes.shape import RoboBrainShape

PLACES = {
    "vision.patch_embed.": Part.PATCH_EMBED,
    "vision.deepstack.": Part.DEEPSTACK,
    "vision.merger.": Part.MERGER,
    "language.embedding.": Part.EMBEDDING,
    "language.layers.": Part.DECODER,
    "language.head.": Part.HEAD,
}
"""Parts by how the names of their parameters begin; vision layers are of two parts."""


def adapted_of(settings: ModelConfig, shape: RoboBrainShape) -> Adapted:
    """What of a model with adapters is trained.

    Raises:
        ValueError: they do not fit the model.
    """
    adapters = adapters_of_run(settings, shape)
    return Adapted(True, True, False, _factors(adapters, shape), _in_full(settings.train_in_full, shape))


def _factors(adapters: Sequence[Adapter], shape: RoboBrainShape) -> dict[Part, PartFactors]:
    counts = dict(zip(PARTS, part_counts(shape).sum(axis=0).tolist(), strict=True))
    sums: dict[Part, Counter[str]] = {}
    places: dict[Part, Counter[str]] = {}
    for linear in linears(shape):
        found = [factor_sizes(adapter, linear) for adapter in adapters if adapted(adapter, linear)]
        if found:
            part = part_of_name(linear.name, shape)
            total = sums.setdefault(part, Counter())
            for each in found:
                total.update(each)
            places.setdefault(part, Counter())[linear.name.rpartition(".")[2]] += 1
    return {
        part: PartFactors(
            total["whole"] / counts[part],
            total["cut"] / counts[part],
            total["columns"] / counts[part],
            {name: number / counts[part] for name, number in places[part].items()},
        )
        for part, total in sums.items()
    }


def factor_sizes(adapter: Adapter, linear: ModelLinear) -> Mapping[str, int]:
    """Parameters of an adapter beside a linear, those that all tensor-parallel ranks hold and those that they share,
    and the columns between its factors."""
    first, second = factor_elements(adapter, linear)
    whole, cut = (first, second) if linear.cut is LinearCut.OUTPUTS else (second, first)
    return {"whole": whole, "cut": cut, "columns": adapter.rank * len(adapted(adapter, linear))}


def _in_full(patterns: Sequence[str], shape: RoboBrainShape) -> dict[Part, float]:
    names = trained_in_full(patterns, shape)
    if shape.text.tied_embeddings and EMBEDDING in names:
        names |= {HEAD}
    trained, whole = Counter[Part](), Counter[Part]()
    for name, rule in weight_table(shape).items():
        part, size = part_of_name(name, shape), math.prod(rule.shape)
        whole[part] += size
        trained[part] += size * (name in names)
    return {part: trained[part] / whole[part] for part in whole if trained[part]}


def part_of_name(name: str, shape: RoboBrainShape) -> Part:
    """The part that a parameter or a module belongs to, by its global name."""
    for beginning, part in PLACES.items():
        if name.startswith(beginning):
            return part
    index, vision = int(name.split(".")[2]), shape.vision
    windowed = vision.window_size > 0 and index not in vision.full_attention_layers
    return Part.WINDOW_LAYER if windowed else Part.FULL_LAYER
