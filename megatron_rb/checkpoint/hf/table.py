"""The weight table: every parameter of this stack, the Hugging Face tensors it is made of, the way in both directions.

A rule is data, not code: blocks of rows of the Hugging Face tensors in the order of the native rows. Joining, splitting
and copying from file to file all read the same blocks, so import and export cannot drift apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_rb.shapes.shape import RoboBrainShape

VISUAL, TEXT = "model.visual", "model.language_model"
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
    vision, text = shape.vision, shape.text
    table: dict[str, WeightRule] = {}
    _add_patch_embed(table, shape)
    for index in range(vision.num_layers):
        _add_vision_layer(table, shape, f"vision.layers.{index}", f"{VISUAL}.blocks.{index}")
    _add_mergers(table, shape)
    vocabulary = (text.vocab_size, text.hidden_size)
    _copy(table, EMBEDDING, f"{TEXT}.embed_tokens.weight", vocabulary)
    for index in range(text.num_layers):
        _add_decoder_layer(table, shape, f"language.layers.{index}", f"{TEXT}.layers.{index}")
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


def _linear(table: Table, native: str, hf: str, outputs: int, inputs: int, bias: bool) -> None:
    _copy(table, f"{native}.weight", f"{hf}.weight", (outputs, inputs))
    if bias:
        _copy(table, f"{native}.bias", f"{hf}.bias", (outputs,))


def _norm(table: Table, native: str, hf: str, size: int, bias: bool) -> None:
    for field in ("weight", "bias") if bias else ("weight",):
        _copy(table, f"{native}.{field}", f"{hf}.{field}", (size,))


def _gate_up(table: Table, native: str, hf: str, outputs: int, inputs: int, bias: bool) -> None:
    for field, tail in (("weight", (inputs,)), ("bias", ())) if bias else (("weight", (inputs,)),):
        names = (f"{hf}.gate_proj.{field}", f"{hf}.up_proj.{field}")
        runs = (RowBlock(0, 0, outputs), RowBlock(1, 0, outputs))
        table[f"{native}.{field}"] = WeightRule((2 * outputs, *tail), names, ((outputs, *tail),) * 2, runs, parts=2)


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


def _add_vision_layer(table: Table, shape: RoboBrainShape, native: str, hf: str) -> None:
    vision, names = shape.vision, shape.traits.names
    size, ffn = vision.hidden_size, vision.ffn_hidden_size
    for norm in ("norm1", "norm2"):
        _norm(table, f"{native}.{norm}", f"{hf}.{norm}", size, vision.norm == "layernorm")
    # Hugging Face: all queries, all keys, all values; here head by head, so that tensor parallelism cuts heads.
    heads, width = vision.num_heads, vision.head_dim
    runs = tuple(RowBlock(0, (part * heads + head) * width, width) for head in range(heads) for part in range(3))
    for field, tail in (("weight", (size,)), ("bias", ())):
        whole = (3 * size, *tail)
        name = f"{native}.attention.linear_qkv.{field}"
        table[name] = WeightRule(whole, (f"{hf}.attn.qkv.{field}",), (whole,), runs)
    _linear(table, f"{native}.attention.linear_proj", f"{hf}.attn.proj", size, size, True)
    if vision.gated_mlp:
        _gate_up(table, f"{native}.mlp.linear_fc1", f"{hf}.mlp", ffn, size, True)
        _linear(table, f"{native}.mlp.linear_fc2", f"{hf}.mlp.down_proj", size, ffn, True)
    else:
        _linear(table, f"{native}.mlp.linear_fc1", f"{hf}.mlp.{names.mlp_fc1}", ffn, size, True)
        _linear(table, f"{native}.mlp.linear_fc2", f"{hf}.mlp.{names.mlp_fc2}", size, ffn, True)


def _add_mergers(table: Table, shape: RoboBrainShape) -> None:
    vision = shape.vision
    names = shape.traits.names
    merged = vision.hidden_size * vision.merge_unit
    places = [("vision.merger", f"{VISUAL}.merger", vision.hidden_size)]
    for number in range(len(vision.deepstack_layers)):
        places.append((f"vision.deepstack.{number}", f"{VISUAL}.deepstack_merger_list.{number}", merged))
    for native, hf, norm_size in places:
        _norm(table, f"{native}.norm", f"{hf}.{names.merger_norm}", norm_size, vision.norm == "layernorm")
        _linear(table, f"{native}.linear_fc1", f"{hf}.{names.merger_fc1}", merged, merged, True)
        _linear(table, f"{native}.linear_fc2", f"{hf}.{names.merger_fc2}", vision.out_hidden_size, merged, True)


def _add_decoder_layer(table: Table, shape: RoboBrainShape, native: str, hf: str) -> None:
    text = shape.text
    size, width, groups = text.hidden_size, text.head_dim, text.num_query_groups
    _norm(table, f"{native}.input_norm", f"{hf}.input_layernorm", size, False)
    _norm(table, f"{native}.post_attention_norm", f"{hf}.post_attention_layernorm", size, False)
    # megatron-core's order: group by group its queries, its key, its value.
    queries = text.num_heads // groups * width
    runs = []
    for group in range(groups):
        runs += [
            RowBlock(0, group * queries, queries),
            RowBlock(1, group * width, width),
            RowBlock(2, group * width, width),
        ]
    rows = (text.num_heads * width, groups * width, groups * width)
    for field, tail in (("weight", (size,)), ("bias", ())) if text.qkv_bias else (("weight", (size,)),):
        names = tuple(f"{hf}.self_attn.{part}_proj.{field}" for part in "qkv")
        shapes = tuple((count, *tail) for count in rows)
        table[f"{native}.attention.linear_qkv.{field}"] = WeightRule((sum(rows), *tail), names, shapes, tuple(runs))
    if text.qk_norm:
        for part in "qk":
            _norm(table, f"{native}.attention.{part}_layernorm", f"{hf}.self_attn.{part}_norm", width, False)
    _linear(
        table, f"{native}.attention.linear_proj", f"{hf}.self_attn.o_proj", size, text.num_heads * width, text.proj_bias
    )
    _gate_up(table, f"{native}.mlp.linear_fc1", f"{hf}.mlp", text.ffn_hidden_size, size, False)
    _linear(table, f"{native}.mlp.linear_fc2", f"{hf}.mlp.down_proj", size, text.ffn_hidden_size, False)
