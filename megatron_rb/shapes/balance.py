"""The layout of a run that states none: blocks spread over the stages by parameter count. Imports no torch."""

from __future__ import annotations

from megatron_rb.layout import Kind, PipelineLayout, balanced_layout, block_list
from megatron_rb.shapes.shape import RoboBrainShape


def matrix_weights(shape: RoboBrainShape) -> dict[Kind, int]:
    """Weights in the matrices of one block of each kind; DeepStack mergers, each a `MERGER` more, stand in none."""
    vision, text = shape.vision, shape.text
    merged = vision.hidden_size * vision.merge_unit
    mlp = (3 if vision.gated_mlp else 2) * vision.hidden_size * vision.ffn_hidden_size
    attention = text.head_dim * text.hidden_size * 2 * (text.num_heads + text.num_query_groups)
    return {
        Kind.PATCH_EMBED: vision.patch_dim * vision.hidden_size,
        Kind.VISION: 4 * vision.hidden_size**2 + mlp,
        Kind.MERGER: merged * merged + merged * vision.out_hidden_size,
        Kind.EMBEDDING: text.vocab_size * text.hidden_size,
        Kind.DECODER: attention + 3 * text.hidden_size * text.ffn_hidden_size,
        Kind.HEAD: text.vocab_size * text.hidden_size,
    }


def block_parameters(shape: RoboBrainShape) -> list[int]:
    """Number of parameters of every block, in block-list order: what the default layout balances."""
    vision, cost = shape.vision, matrix_weights(shape)
    return [
        cost[b.kind] + (cost[Kind.MERGER] if b.kind is Kind.VISION and b.index in vision.deepstack_layers else 0)
        for b in block_list(vision.num_layers, shape.text.num_layers)
    ]


def default_layout(shape: RoboBrainShape, pp_size: int) -> PipelineLayout:
    """Blocks spread over the stages by parameter count."""
    return balanced_layout(block_parameters(shape), shape.vision.num_layers, pp_size)
