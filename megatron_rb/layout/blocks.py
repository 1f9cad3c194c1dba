"""The ordered block list of a RoboBrain model: patch_embed, vision layers, merger, embedding, decoder layers, head."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """What a block is; the value is its letter in the text form of a layout."""

    PATCH_EMBED = "P"
    VISION = "v"
    MERGER = "M"
    EMBEDDING = "E"
    DECODER = "t"
    HEAD = "L"


@dataclass(frozen=True)
class Block:
    """One block; `index` is the global layer number for vision and decoder layers, else 0."""

    kind: Kind
    index: int = 0


def block_list(num_vision_layers: int, num_decoder_layers: int) -> tuple[Block, ...]:
    """All blocks of a model in the order in which a sample passes through them."""
    return (
        Block(Kind.PATCH_EMBED),
        *(Block(Kind.VISION, i) for i in range(num_vision_layers)),
        Block(Kind.MERGER),
        Block(Kind.EMBEDDING),
        *(Block(Kind.DECODER, i) for i in range(num_decoder_layers)),
        Block(Kind.HEAD),
    )
