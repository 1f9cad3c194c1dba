"""FLOPs, bytes and parameters of every kind of block: what the cost and memory models are made of.

Every figure is of one rank of a tensor-parallel group unless it says otherwise.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from enum import Enum

import numpy as np

from megatron_rb.kernels.mrope.cost import mrope_bytes
from megatron_rb.layout import Kind, block_list
from megatron_rb.planner.sizes import ModelSizes, TextSizes, VisionSizes, padded_ffn, window_patches
from megatron_rb.planner.workload import MicroBatches


class Part(Enum):
    """What blocks are made of; blocks of one part cost the same."""

    PATCH_EMBED = "patch embedding"
    WINDOW_LAYER = "vision layer, windows"
    FULL_LAYER = "vision layer, whole frames"
    DEEPSTACK = "DeepStack merger"
    MERGER = "merger"
    EMBEDDING = "embedding"
    DECODER = "decoder layer"
    HEAD = "head and loss"


PARTS = tuple(Part)
VISION_PARTS = (Part.PATCH_EMBED, Part.WINDOW_LAYER, Part.FULL_LAYER)
MERGER_PARTS = (Part.DEEPSTACK, Part.MERGER)
LANGUAGE_PARTS = (Part.EMBEDDING, Part.DECODER, Part.HEAD)
VISION_LAYERS = (Part.WINDOW_LAYER, Part.FULL_LAYER)


@dataclass(frozen=True)
class Shards:
    """How the tensors of a block are cut."""

    tp_size: int
    sequence_parallel: bool
    itemsize: int
    """Bytes of a value in the model's dtype."""
    cp_size: int = 1
    """Ranks that share the tokens and the frames of a micro-batch; what a rank has of it is a micro-batch of its own
    for all that follows (`MicroBatches.of_context_rank`)."""

    @property
    def rows_over(self) -> int:
        """Ranks that share the rows of norms and residuals."""
        return self.tp_size if self.sequence_parallel else 1


@dataclass(frozen=True)
class BlockWork:
    """What the forward pass of one block does for each micro-batch."""

    matmul: np.ndarray
    """FLOPs of matrix products with weights."""
    matmuls: int
    """How many products these are."""
    attention: np.ndarray
    """FLOPs of attention."""
    attended: np.ndarray
    """Tokens that a token attends to, on average; at least 1."""
    bytes: np.ndarray
    """Moved by element-wise work, and weights read."""
    operators: int


def gathered_values(text: TextSizes, shards: Shards) -> float:
    """Values of keys and values that a decoder layer has of each token of the whole micro-batch, under context
    parallelism."""
    return 2.0 * text.num_query_groups / shards.tp_size * text.head_dim if shards.cp_size > 1 else 0.0


@functools.lru_cache(maxsize=64)
def part_counts(model: ModelSizes) -> np.ndarray:
    """int64 `[blocks, parts]`, read only: what each block of the model is made of.

    A vision layer with a DeepStack merger is two parts.
    """
    vision = model.vision
    blocks = block_list(vision.num_layers, model.text.num_layers)
    counts = np.zeros((len(blocks), len(PARTS)), dtype=np.int64)
    single = {
        Kind.PATCH_EMBED: Part.PATCH_EMBED,
        Kind.MERGER: Part.MERGER,
        Kind.EMBEDDING: Part.EMBEDDING,
        Kind.DECODER: Part.DECODER,
        Kind.HEAD: Part.HEAD,
    }
    for number, block in enumerate(blocks):
        part = single.get(block.kind)
        if part is None:
            windowed = vision.window_size > 0 and block.index not in vision.full_attention_layers
            part = Part.WINDOW_LAYER if windowed else Part.FULL_LAYER
            counts[number, PARTS.index(Part.DEEPSTACK)] = block.index in vision.deepstack_layers
        counts[number, PARTS.index(part)] += 1
    counts.flags.writeable = False
    return counts


def parameters(model: ModelSizes, tp_size: int) -> dict[Part, int]:
    """Parameters of each part on one rank, padding of the ViT's ffn included."""
    vision, text = model.vision, model.text
    h, ffn = vision.hidden_size, padded_ffn(vision.ffn_hidden_size, tp_size)
    parts, norm = 2 if vision.gated_mlp else 1, _norm_parameters(vision)
    layer = (3 * h * h + 3 * h + h * h) // tp_size + h
    layer += parts * ffn * (h + 1) + ffn * h + h + 2 * norm
    merged = h * vision.merge_unit
    joined = (merged * merged + merged + merged * text.hidden_size) // tp_size + text.hidden_size
    decoder = _decoder_parameters(text, tp_size)
    patch = h * vision.patch_dim + h * vision.patch_bias + vision.position_grid_side**2 * h
    vocabulary = text.vocab_size * text.hidden_size // tp_size
    return {
        Part.PATCH_EMBED: patch,
        Part.WINDOW_LAYER: layer,
        Part.FULL_LAYER: layer,
        Part.DEEPSTACK: joined + (merged if vision.norm == "rmsnorm" else 2 * merged),
        Part.MERGER: joined + norm,
        Part.EMBEDDING: vocabulary,
        Part.DECODER: decoder,
        Part.HEAD: vocabulary + text.hidden_size,
    }


def _norm_parameters(vision: VisionSizes) -> int:
    return vision.hidden_size * (1 if vision.norm == "rmsnorm" else 2)


def _decoder_parameters(text: TextSizes, tp_size: int) -> int:
    h, qkv = text.hidden_size, (text.num_heads + 2 * text.num_query_groups) * text.head_dim
    attention = (qkv * h + qkv * text.qkv_bias + text.num_heads * text.head_dim * h) // tp_size
    mlp = 3 * h * padded_ffn(text.ffn_hidden_size, tp_size)
    return attention + mlp + 2 * h + 2 * text.head_dim * text.qk_norm


def forward_work(model: ModelSizes, shards: Shards, batches: MicroBatches) -> dict[Part, BlockWork]:
    """What each part does in its forward pass."""
    works = {part: _vision_layer(model.vision, shards, batches, part) for part in VISION_LAYERS}
    merge = _merge(model, shards, batches)
    return works | {
        Part.PATCH_EMBED: _patch_embed(model.vision, shards, batches),
        Part.DEEPSTACK: merge,
        Part.MERGER: merge,
        Part.EMBEDDING: _embedding(model.text, shards, batches),
        Part.DECODER: _decoder(model.text, shards, batches),
        Part.HEAD: _head(model.text, shards, batches),
    }


def _patch_embed(vision: VisionSizes, shards: Shards, batches: MicroBatches) -> BlockWork:
    # Every tensor-parallel rank embeds all patches.
    matmul = 2.0 * batches.patches * vision.patch_dim * vision.hidden_size
    moved = batches.patches * (4.0 * vision.patch_dim + 4.0 * vision.hidden_size * shards.itemsize)
    return _work(matmul, 1, moved, 6)


def _vision_layer(vision: VisionSizes, shards: Shards, batches: MicroBatches, part: Part) -> BlockWork:
    tp, size, h = shards.tp_size, shards.itemsize, vision.hidden_size
    ffn = padded_ffn(vision.ffn_hidden_size, tp)
    products = 3 if vision.gated_mlp else 2
    matmul = 2.0 * batches.patches * (4 * h * h / tp + products * h * ffn)
    window = window_patches(vision)
    pairs = batches.patches * window if part is Part.WINDOW_LAYER else batches.frame_pairs
    attention = 4.0 * pairs * h / tp
    moved = _norms_and_residuals(batches.patches / shards.rows_over, h, size)
    moved = moved + batches.patches * (8 * h / tp + (6 if vision.gated_mlp else 2) * ffn) * size
    moved = moved + mrope_bytes(1, vision.num_heads // tp, vision.num_heads // tp, h // vision.num_heads, size) * (
        batches.patches
    )
    attended = np.maximum(pairs / np.maximum(batches.patches, 1), 1.0)
    weights = (4 * h * h / tp + products * h * ffn) * size
    return BlockWork(matmul, 4, attention, attended, moved + weights, 24)


def _decoder(text: TextSizes, shards: Shards, batches: MicroBatches) -> BlockWork:
    tp, size, h = shards.tp_size, shards.itemsize, text.hidden_size
    ffn, heads, groups = padded_ffn(text.ffn_hidden_size, tp), text.num_heads // tp, text.num_query_groups // tp
    qkv = (heads + 2 * groups) * text.head_dim
    weights = h * qkv + heads * text.head_dim * h + 3 * h * ffn
    matmul = 2.0 * batches.tokens * weights
    attention = 2.0 * batches.pairs * heads * text.head_dim  # the causal mask leaves half of four
    moved = _norms_and_residuals(batches.tokens / shards.rows_over, h, size)
    moved = moved + batches.tokens * (4 * qkv + 6 * ffn) * size
    moved = moved + batches.tokens * mrope_bytes(1, heads, groups, text.head_dim, size)
    attended = np.maximum(batches.pairs / np.maximum(batches.tokens, 1) / 2, 1.0)
    return BlockWork(matmul, 4, attention, attended, moved + weights * size, 28)


def _merge(model: ModelSizes, shards: Shards, batches: MicroBatches) -> BlockWork:
    vision = model.vision
    merged = vision.hidden_size * vision.merge_unit
    weights = merged * (merged + model.text.hidden_size) / shards.tp_size
    rows = batches.patches / vision.merge_unit
    moved = rows * (6 * merged + 3 * merged / shards.tp_size + model.text.hidden_size) * shards.itemsize
    return _work(2.0 * rows * weights, 2, moved + weights * shards.itemsize, 10)


def _embedding(text: TextSizes, shards: Shards, batches: MicroBatches) -> BlockWork:
    return _work(0.0 * batches.tokens, 0, batches.tokens * 6.0 * text.hidden_size * shards.itemsize, 8)


def _head(text: TextSizes, shards: Shards, batches: MicroBatches) -> BlockWork:
    vocabulary = text.vocab_size / shards.tp_size
    matmul = 2.0 * batches.labels * text.hidden_size * vocabulary
    # The logits are written, read as fp32 and passed over by the softmax and the loss.
    moved = batches.labels * vocabulary * (2 * shards.itemsize + 16)
    moved = moved + batches.tokens * 4.0 * text.hidden_size * shards.itemsize
    return _work(matmul, 1, moved + vocabulary * text.hidden_size * shards.itemsize, 16)


def _norms_and_residuals(rows: np.ndarray, hidden_size: int, itemsize: int) -> np.ndarray:
    # Two norms with statistics in fp32 and two additions.
    norm = 2 * itemsize if itemsize == 4 else 5 * itemsize + 12
    return rows * hidden_size * 2.0 * (norm + 3 * itemsize)


def _work(matmul: np.ndarray, matmuls: int, moved: np.ndarray, operators: int) -> BlockWork:
    zero = np.zeros_like(moved, dtype=np.float64)
    return BlockWork(matmul + zero, matmuls, zero, zero + 1.0, moved + zero, operators)
