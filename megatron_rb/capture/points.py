"""The points inside each block whose tensors are kept, in the order in which a sample passes them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Rows(str, Enum):
    """What a row of a tensor stands for."""

    PATCH = "patch"
    MERGED = "merged"
    """A token of the merger's output: `merge_unit` patches."""
    TOKEN = "token"
    LABEL = "label"
    """A token whose next token is trained on."""

    __str__ = str.__str__


class Columns(str, Enum):
    """How tensor-parallel ranks share the features of a row."""

    ALL = "all"
    OUTPUT = "output"
    """As the output features of the point's column-parallel linear."""
    INPUT = "input"
    """As the input features of the point's row-parallel linear."""
    HEADS = "heads"
    """Whole heads, in order of the ranks."""

    __str__ = str.__str__


@dataclass(frozen=True)
class Point:
    """A tensor of a block: an argument or the output of one of its modules."""

    name: str
    module: str
    """Path inside the block; empty = the block."""
    argument: int | None
    """Number of the argument; None = the output."""
    rows: Rows
    columns: Columns = Columns.ALL
    context: bool = False
    """Keys and values: kept for all rows that the chosen queries attend to."""


def _layer_points(rows: Rows, norm1: str, norm2: str) -> tuple[Point, ...]:
    core, proj = "attention.core", "attention.linear_proj"
    return (
        Point("input", "", 0, rows),
        Point("norm1", norm1, None, rows),
        Point("qkv", "attention.linear_qkv", None, rows, Columns.OUTPUT),
        Point("q", core, 0, rows, Columns.HEADS),
        Point("k", core, 1, rows, Columns.HEADS, context=True),
        Point("v", core, 2, rows, Columns.HEADS, context=True),
        Point("attention", proj, 0, rows, Columns.INPUT),
        Point("proj", proj, None, rows),
        Point("residual", norm2, 0, rows),
        Point("norm2", norm2, None, rows),
        Point("fc1", "mlp.linear_fc1", None, rows, Columns.OUTPUT),
        Point("activation", "mlp.linear_fc2", 0, rows, Columns.INPUT),
        Point("fc2", "mlp.linear_fc2", None, rows),
        Point("output", "", None, rows),
    )


def _merger_points(norm_rows: Rows) -> tuple[Point, ...]:
    return (
        Point("input", "", 0, Rows.PATCH),
        Point("norm", "norm", None, norm_rows),
        Point("fc1", "linear_fc1", None, Rows.MERGED, Columns.OUTPUT),
        Point("activation", "linear_fc2", 0, Rows.MERGED, Columns.INPUT),
        Point("output", "", None, Rows.MERGED),
    )


VISION_LAYER = _layer_points(Rows.PATCH, "norm1", "norm2")
DECODER_LAYER = _layer_points(Rows.TOKEN, "input_norm", "post_attention_norm")
MERGER, DEEPSTACK = _merger_points(Rows.PATCH), _merger_points(Rows.MERGED)
PATCH_EMBED = (Point("output", "", None, Rows.PATCH),)
EMBEDDING = (Point("output", "", None, Rows.TOKEN),)
HEAD = (
    Point("input", "norm", 0, Rows.LABEL),
    Point("norm", "norm", None, Rows.LABEL),
)
"""The logits are made and used up inside one operator; its gradient is that of `norm`."""


def points_of(block: str) -> tuple[Point, ...]:
    """The points of a block by its global name."""
    kind = block.rstrip("0123456789").rstrip(".")
    return {
        "vision.patch_embed": PATCH_EMBED,
        "vision.layers": VISION_LAYER,
        "vision.deepstack": DEEPSTACK,
        "vision.merger": MERGER,
        "language.embedding": EMBEDDING,
        "language.layers": DECODER_LAYER,
        "language.head": HEAD,
    }[kind]


def block_names(num_vision: int, deepstack_layers: tuple[int, ...], num_decoder: int) -> list[str]:
    """Global names of all blocks of a model in the order of the computation.

    Args:
        deepstack_layers: vision layers after which a DeepStack merger follows, sorted.
    """
    names = ["vision.patch_embed"]
    for layer in range(num_vision):
        names.append(f"vision.layers.{layer}")
        if layer in deepstack_layers:
            names.append(f"vision.deepstack.{deepstack_layers.index(layer)}")
    names += ["vision.merger", "language.embedding"]
    return [*names, *(f"language.layers.{layer}" for layer in range(num_decoder)), "language.head"]
