"""The weight table: every parameter of this stack, the Hugging Face tensors it is made of, the way in both directions.

A rule is data, not code: blocks of rows of the Hugging Face tensors in the order of the native rows. Joining, splitting
and copying from file to file all read the same blocks, so import and export cannot drift apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from megatron_rb.shapes.linears import TEXT, VISUAL, ModelLinear, RowOrder, linears, mergers
from megatron_rb.shapes.shape import RoboBrainShape

EMBEDDING, HEAD = "language.embedding.tokens.weight", "language.head.output.weight"


@dataclass(frozen=True)
class RowBlock:
    """A block of rows of one Hugging Face tensor."""

    source: int
    """Which of the rule's tensors."""
    start: int
    count: int


@dataclass(frozen=True)
class WeightRule:
    """One native parameter and its Hugging Face tensors."""

    shape: tuple[int, ...]
    """Full native shape: global, unpadded, fused parts below each other."""
    hf_names: tuple[str, ...]
    hf_shapes: tuple[tuple[int, ...], ...]
    runs: tuple[RowBlock, ...]
    """Rows of the native parameter, in order; they use every row of every source once."""
    parts: int = 1
    """Fused parts, each cut by tensor parallelism (2 for gate and up); more than one lie on a leading dimension in a
    checkpoint.
    """

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape in a checkpoint."""
        if self.parts == 1:
            return self.shape
        return (self.parts, self.shape[0] // self.parts, *self.shape[1:])

    def join(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """The native parameter from its sources."""
        if len(self.runs) == 1:
            return tensors[0].reshape(self.shape)
        rows = [tensors[run.source].narrow(0, run.start, run.count) for run in self.runs]
        return torch.cat(rows).reshape(self.shape)

    def split(self, full: torch.Tensor) -> list[torch.Tensor]:
        """The sources from the native parameter."""
        if len(self.runs) == 1:
            return [full.reshape(self.hf_shapes[0])]
        rows = full.split([run.count for run in self.runs])
        return [
            torch.cat([rows[number] for number, _, _ in self.rows_of(source)]).reshape(shape)
            for source, shape in enumerate(self.hf_shapes)
        ]

    def rows_of(self, source: int) -> list[tuple[int, int, int]]:
        """`(number of the run, native start, count)` of the native rows that make up one source, in its order."""
        found, native = [], 0
        for number, run in enumerate(self.runs):
            if run.source == source:
                found.append((run.start, number, native, run.count))
            native += run.count
        return [(number, start, count) for _, number, start, count in sorted(found)]


def weight_table(shape: RoboBrainShape) -> dict[str, WeightRule]:
    """All rules by native parameter name."""
    text = shape.text
    table: dict[str, WeightRule] = {}
    _add_patch_embed(table, shape)
    _add_layers(table, shape, "vision.")
    vocabulary = (text.vocab_size, text.hidden_size)
    _copy(table, EMBEDDING, f"{TEXT}.embed_tokens.weight", vocabulary)
    _add_layers(table, shape, "language.")
    _copy(table, "language.head.norm.weight", f"{TEXT}.norm.weight", (text.hidden_size,))
    _copy(table, HEAD, f"{TEXT}.embed_tokens.weight" if text.tied_embeddings else "lm_head.weight", vocabulary)
    return table


def stored_rules(shape: RoboBrainShape) -> dict[str, WeightRule]:
    """The rules of what a checkpoint stores: tied embeddings once."""
    table = weight_table(shape)
    if shape.text.tied_embeddings:
        del table[HEAD]
    return table


Table = dict[str, WeightRule]
Shape = tuple[int, ...]


def _copy(table: Table, native: str, hf_name: str, hf_shape: Shape, shape: Shape | None = None) -> None:
    table[native] = WeightRule(shape or hf_shape, (hf_name,), (hf_shape,), (RowBlock(0, 0, hf_shape[0]),))


def _norm(table: Table, native: str, hf: str, size: int, bias: bool) -> None:
    for field in ("weight", "bias") if bias else ("weight",):
        _copy(table, f"{native}.{field}", f"{hf}.{field}", (size,))


def _add_patch_embed(table: Table, shape: RoboBrainShape) -> None:
    vision = shape.vision
    kernel = (vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    size, hf = vision.hidden_size, f"{VISUAL}.patch_embed.proj"
    _copy(table, "vision.patch_embed.weight", f"{hf}.weight", (size, *kernel), (size, math.prod(kernel)))
    if vision.patch_bias:
        _copy(table, "vision.patch_embed.bias", f"{hf}.bias", (size,))
    if vision.position_grid_side:
        grid = vision.position_grid_side**2
        _copy(table, "vision.patch_embed.position", f"{VISUAL}.pos_embed.weight", (grid, size))


def _add_layers(table: Table, shape: RoboBrainShape, tower: str) -> None:
    """Norms and linears, layer by layer."""
    own: dict[str, list[ModelLinear]] = {}
    for linear in (linear for linear in linears(shape) if linear.name.startswith(tower)):
        own.setdefault(linear.layer, []).append(linear)
    for layer, members in own.items():
        for native, hf, size, bias in _norms(shape, layer):
            _norm(table, native, hf, size, bias)
        for linear in members:
            _add_linear(table, linear, shape)


def _norms(shape: RoboBrainShape, layer: str) -> Iterator[tuple[str, str, int, bool]]:
    """Name here and in Hugging Face files, size and whether there is a bias, of every norm of a layer."""
    vision, text = shape.vision, shape.text
    index, layer_norm = layer.rpartition(".")[2], vision.norm == "layernorm"
    if layer.startswith("vision.layers."):
        for norm in ("norm1", "norm2"):
            yield f"{layer}.{norm}", f"{VISUAL}.blocks.{index}.{norm}", vision.hidden_size, layer_norm
    elif layer.startswith("vision."):
        size = vision.hidden_size * (1 if layer == "vision.merger" else vision.merge_unit)
        yield f"{layer}.norm", f"{dict(mergers(shape))[layer]}.{shape.traits.names.merger_norm}", size, layer_norm
    else:
        hf = f"{TEXT}.layers.{index}"
        yield f"{layer}.input_norm", f"{hf}.input_layernorm", text.hidden_size, False
        yield f"{layer}.post_attention_norm", f"{hf}.post_attention_layernorm", text.hidden_size, False
        for part in "qk" if text.qk_norm else "":
            yield f"{layer}.attention.{part}_layernorm", f"{hf}.self_attn.{part}_norm", text.head_dim, False


def _add_linear(table: Table, linear: ModelLinear, shape: RoboBrainShape) -> None:
    runs, parts = rows_of_linear(linear, shape), len(linear.modules) if linear.order is RowOrder.STACKED else 1
    for field, tail in (("weight", (linear.inputs,)), ("bias", ())) if linear.bias else (("weight", (linear.inputs,)),):
        names = tuple(f"{module.name}.{field}" for module in linear.modules)
        shapes = tuple((module.outputs, *tail) for module in linear.modules)
        table[f"{linear.name}.{field}"] = WeightRule((linear.outputs, *tail), names, shapes, runs, parts)


def rows_of_linear(linear: ModelLinear, shape: RoboBrainShape) -> tuple[RowBlock, ...]:
    """Blocks of rows of its Hugging Face tensors in the order of its own rows."""
    if linear.order is RowOrder.HEADS:
        # Hugging Face: all queries, all keys, all values; here head by head, so that tensor parallelism cuts heads.
        heads, width = shape.vision.num_heads, shape.vision.head_dim
        return tuple(RowBlock(0, (part * heads + head) * width, width) for head in range(heads) for part in range(3))
    if linear.order is RowOrder.GROUPS:
        # megatron-core's order: group by group its queries, its key, its value.
        groups = shape.text.num_query_groups
        widths = [module.outputs // groups for module in linear.modules]
        return tuple(
            RowBlock(source, group * width, width) for group in range(groups) for source, width in enumerate(widths)
        )
    return tuple(RowBlock(source, 0, module.outputs) for source, module in enumerate(linear.modules))
