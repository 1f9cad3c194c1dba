"""What travels between pipeline stages: one flat tensor that holds the hidden state and the DeepStack features.

megatron-core's schedules send one tensor per boundary. Both sides know the micro-batch, so both can compute what the
tensor holds; nothing but values is sent.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_rb.layout import Block, Kind, StageSlice, block_list
from megatron_rb.models.inputs import MicroBatch
from megatron_rb.shapes.shape import RoboBrainShape


@dataclass(frozen=True)
class Flow:
    """The state of a sample between two blocks."""

    stream: torch.Tensor
    """`[rows, 1, width]`: patches in the ViT, merged tokens between merger and embedding, tokens after that."""
    deepstack: dict[int, torch.Tensor]
    """By the number of their merger, those that no decoder layer has added yet: `[merged patches, 1, text hidden]`."""


@dataclass(frozen=True)
class Boundary:
    """Which tensors cross the border in front of a slice."""

    stream: Kind
    """`PATCH_EMBED` = patches, `MERGER` = merged tokens, `DECODER` = tokens."""
    deepstack: tuple[int, ...]
    """Numbers of the DeepStack features beside the stream."""


def boundary_before(
    part: StageSlice, shape: RoboBrainShape, num_vision_layers: int, num_decoder_layers: int
) -> Boundary:
    """What a slice receives; only slices after the first receive anything."""
    blocks = block_list(num_vision_layers, num_decoder_layers)
    done = set(blocks[: blocks.index(part.blocks[0])])
    produced = [
        number
        for number, layer in enumerate(sorted(shape.vision.deepstack_layers))
        if Block(Kind.VISION, layer) in done
    ]
    waiting = tuple(number for number in produced if Block(Kind.DECODER, number) not in done)
    if Block(Kind.EMBEDDING) in done:
        return Boundary(Kind.DECODER, waiting)
    return Boundary(Kind.MERGER if Block(Kind.MERGER) in done else Kind.PATCH_EMBED, waiting)


def pack(flow: Flow) -> torch.Tensor:
    """One `[values, 1, 1]` tensor; always a fresh one, so that the schedule may free it after sending."""
    pieces = [flow.stream, *(flow.deepstack[number] for number in sorted(flow.deepstack))]
    return torch.cat([piece.reshape(-1, 1, 1) for piece in pieces])


def sizes_of(boundary: Boundary, batch: MicroBatch, shape: RoboBrainShape, rows_split_over: int) -> list[int]:
    """Values of the tensors that cross a border for a micro-batch: the stream, then every DeepStack feature.

    Args:
        rows_split_over: ranks that share the rows of the stream (the tensor-parallel size under sequence parallelism).
    """
    rows, width = _stream_size(boundary, batch, shape, rows_split_over)
    return [rows * width] + [_merged(batch, shape) * shape.text.hidden_size] * len(boundary.deepstack)


def unpack(
    flat: torch.Tensor, boundary: Boundary, batch: MicroBatch, shape: RoboBrainShape, rows_split_over: int
) -> Flow:
    """Cut a received tensor into its parts; see `sizes_of`."""
    sizes = sizes_of(boundary, batch, shape, rows_split_over)
    if flat.numel() != sum(sizes):
        raise RuntimeError(
            f"a pipeline stage received {flat.numel()} values not {sum(sizes)}: the stages read different batches"
        )
    stream, *features = flat.flatten().split(sizes)
    merged = _merged(batch, shape)
    return Flow(
        stream.view(-1, 1, _stream_size(boundary, batch, shape, rows_split_over)[1]),
        {number: feature.view(merged, 1, -1) for number, feature in zip(boundary.deepstack, features, strict=True)},
    )


def _stream_size(boundary: Boundary, batch: MicroBatch, shape: RoboBrainShape, rows_split_over: int) -> tuple[int, int]:
    """Rows and width."""
    return {
        Kind.PATCH_EMBED: (batch.vision.num_patches // rows_split_over, shape.vision.hidden_size),
        Kind.MERGER: (_merged(batch, shape), shape.text.hidden_size),
        Kind.DECODER: (batch.text.num_tokens // rows_split_over, shape.text.hidden_size),
    }[boundary.stream]


def _merged(batch: MicroBatch, shape: RoboBrainShape) -> int:
    return batch.vision.num_patches // shape.vision.merge_unit
