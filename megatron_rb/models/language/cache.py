"""Keys and values of earlier tokens, so that a generated token goes through the decoder layers alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from megatron_rb.kernels.varlen_attention.segments import Segments
from megatron_rb.models.layers import PackedAttention


@dataclass(frozen=True)
class _Pass:
    """What the layers of one pass share."""

    places: torch.Tensor
    """int64 `[real tokens]`: row of each token in the flattened cache."""
    longest: int
    """Tokens of the longest sequence after this pass."""
    visible: torch.Tensor | None
    """bool `[sequences, 1, 1, longest]`: what a new token sees; None in the first pass: prompts see themselves."""


class DecoderCache:
    """Of all decoder layers of one rank, for a batch of sequences.

    The first pass brings the whole prompts, packed one after the other; every later pass one token per sequence, after
    `advance`. Rows behind those of the sequences are padding and are not kept.

    Args:
        prompt_lengths: tokens of each prompt.
        new_tokens: passes of one token that will follow.
    """

    def __init__(self, prompt_lengths: Sequence[int], new_tokens: int, device: torch.device) -> None:
        self.capacity = max(prompt_lengths, default=0) + new_tokens
        self.lengths = torch.tensor(list(prompt_lengths), dtype=torch.int64)
        self.device = device
        places = [number * self.capacity + torch.arange(length) for number, length in enumerate(prompt_lengths)]
        first = torch.cat(places) if places else torch.zeros(0, dtype=torch.int64)
        self.present = _Pass(first.to(device), int(max(prompt_lengths, default=0)), None)
        self._layers: dict[int, LayerCache] = {}

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)

    def layer(self, number: int) -> LayerCache:
        """The part of one decoder layer, by its global number."""
        return self._layers.setdefault(number, LayerCache(self))

    def advance(self) -> None:
        """Make room for one further token of every sequence."""
        places = torch.arange(self.num_sequences) * self.capacity + self.lengths
        self.lengths = self.lengths + 1
        longest = int(self.lengths.max()) if self.num_sequences else 0
        visible = torch.arange(longest) < self.lengths[:, None]
        self.present = _Pass(places.to(self.device), longest, visible[:, None, None].to(self.device))


@dataclass
class LayerCache:
    """Keys and values of one decoder layer, the heads of this rank."""

    owner: DecoderCache
    keys: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    """`[sequences, capacity, groups, head_dim]`, rotated."""
    values: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, samples: Segments, packed: PackedAttention
    ) -> torch.Tensor:
        """Keep the keys and values of a pass and attend to all that are kept.

        Args:
            q: `[tokens, heads, head_dim]`; k, v: `[tokens, groups, head_dim]`, rotated.
            packed: does the first pass, in which there is nothing to attend to but the pass itself.

        Returns:
            `[tokens, heads * head_dim]`
        """
        present = self.owner.present
        if present.visible is None:
            self.keys, self.values = (self._room(x) for x in (k, v))
        count = len(present.places)
        for kept, new in ((self.keys, k), (self.values, v)):
            kept.flatten(0, 1).index_copy_(0, present.places, new[:count])
        if present.visible is None:
            return packed(q, k, v, samples)
        out = q.new_zeros(q.shape[0], q.shape[1] * q.shape[2])
        if count:
            keys, values = (x[:, : present.longest].transpose(1, 2) for x in (self.keys, self.values))
            out[:count] = F.scaled_dot_product_attention(
                q[:count].unsqueeze(2), keys, values, attn_mask=present.visible, enable_gqa=q.shape[1] != k.shape[1]
            ).flatten(1)
        return out

    def _room(self, like: torch.Tensor) -> torch.Tensor:
        # Zeros: a masked value still is multiplied by 0, and memory as it comes may hold NaN.
        return like.new_zeros(self.owner.num_sequences, self.owner.capacity, *like.shape[1:])
