"""The linears of a model: what each is called here and in Hugging Face files, its sizes, and how its rows go.

The weight table, the adapters and the planner read this one list. Embedding, head and patch embedding are not in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from megatron_rb.shapes.shape import RoboBrainShape

VISUAL, TEXT = "model.visual", "model.language_model"
"""What the names of transformers' modules begin with."""


class LinearCut(Enum):
    """What of a linear the tensor-parallel ranks share."""

    OUTPUTS = "column"
    INPUTS = "row"


class RowOrder(Enum):
    """In what order the rows of the modules of Hugging Face lie in one linear."""

    PLAIN = "those of one module"
    STACKED = "module after module, each cut by tensor parallelism"
    HEADS = "those of one module, which has all queries, keys and values, head by head: its query, its key, its value"
    GROUPS = "group by group: the queries, the key and the value of one group of heads"


@dataclass(frozen=True)
class HFModule:
    """A linear of transformers."""

    name: str
    outputs: int


@dataclass(frozen=True)
class ModelLinear:
    """A linear of a model, which may be several of transformers in one."""

    name: str
    """Of the module."""
    modules: tuple[HFModule, ...]
    inputs: int
    bias: bool
    cut: LinearCut
    order: RowOrder = RowOrder.PLAIN

    @property
    def layer(self) -> str:
        """Name of the layer, or of the merger, that it belongs to."""
        return re.split(r"\.(?:attention|mlp|linear_\w+)\b", self.name)[0]

    @property
    def outputs(self) -> int:
        return sum(module.outputs for module in self.modules)


def linears(shape: RoboBrainShape) -> list[ModelLinear]:
    """All of them, in the order of the layers."""
    vision, merged = shape.vision, shape.vision.hidden_size * shape.vision.merge_unit
    found: list[ModelLinear] = []
    for index in range(vision.num_layers):
        found += _vision_layer(shape, f"vision.layers.{index}", f"{VISUAL}.blocks.{index}")
    names = shape.traits.names
    for name, hf in mergers(shape):
        found.append(_plain(f"{name}.linear_fc1", f"{hf}.{names.merger_fc1}", merged, merged, True, LinearCut.OUTPUTS))
        found.append(
            _plain(
                f"{name}.linear_fc2", f"{hf}.{names.merger_fc2}", vision.out_hidden_size, merged, True, LinearCut.INPUTS
            )
        )
    for index in range(shape.text.num_layers):
        found += _decoder_layer(shape, f"language.layers.{index}", f"{TEXT}.layers.{index}")
    return found


def mergers(shape: RoboBrainShape) -> Iterator[tuple[str, str]]:
    """Names of the mergers here and in Hugging Face files, the main one first."""
    yield "vision.merger", f"{VISUAL}.merger"
    for number in range(len(shape.vision.deepstack_layers)):
        yield f"vision.deepstack.{number}", f"{VISUAL}.deepstack_merger_list.{number}"


def _plain(name: str, hf: str, outputs: int, inputs: int, bias: bool, cut: LinearCut) -> ModelLinear:
    return ModelLinear(name, (HFModule(hf, outputs),), inputs, bias, cut)


def _vision_layer(shape: RoboBrainShape, name: str, hf: str) -> Iterator[ModelLinear]:
    vision, names = shape.vision, shape.traits.names
    size, ffn = vision.hidden_size, vision.ffn_hidden_size
    qkv = (HFModule(f"{hf}.attn.qkv", 3 * size),)
    yield ModelLinear(f"{name}.attention.linear_qkv", qkv, size, True, LinearCut.OUTPUTS, RowOrder.HEADS)
    yield _plain(f"{name}.attention.linear_proj", f"{hf}.attn.proj", size, size, True, LinearCut.INPUTS)
    if vision.gated_mlp:
        yield _gate_up(f"{name}.mlp.linear_fc1", f"{hf}.mlp", ffn, size, True)
        yield _plain(f"{name}.mlp.linear_fc2", f"{hf}.mlp.down_proj", size, ffn, True, LinearCut.INPUTS)
    else:
        yield _plain(f"{name}.mlp.linear_fc1", f"{hf}.mlp.{names.mlp_fc1}", ffn, size, True, LinearCut.OUTPUTS)
        yield _plain(f"{name}.mlp.linear_fc2", f"{hf}.mlp.{names.mlp_fc2}", size, ffn, True, LinearCut.INPUTS)


def _decoder_layer(shape: RoboBrainShape, name: str, hf: str) -> Iterator[ModelLinear]:
    text = shape.text
    size, queries, keys = text.hidden_size, text.num_heads * text.head_dim, text.num_query_groups * text.head_dim
    rows = {"q": queries, "k": keys, "v": keys}
    qkv = tuple(HFModule(f"{hf}.self_attn.{part}_proj", count) for part, count in rows.items())
    yield ModelLinear(f"{name}.attention.linear_qkv", qkv, size, text.qkv_bias, LinearCut.OUTPUTS, RowOrder.GROUPS)
    proj = f"{hf}.self_attn.o_proj"
    yield _plain(f"{name}.attention.linear_proj", proj, size, queries, text.proj_bias, LinearCut.INPUTS)
    yield _gate_up(f"{name}.mlp.linear_fc1", f"{hf}.mlp", text.ffn_hidden_size, size, False)
    down = f"{hf}.mlp.down_proj"
    yield _plain(f"{name}.mlp.linear_fc2", down, size, text.ffn_hidden_size, False, LinearCut.INPUTS)


def _gate_up(name: str, hf: str, outputs: int, inputs: int, bias: bool) -> ModelLinear:
    modules = tuple(HFModule(f"{hf}.{part}_proj", outputs) for part in ("gate", "up"))
    return ModelLinear(name, modules, inputs, bias, LinearCut.OUTPUTS, RowOrder.STACKED)
