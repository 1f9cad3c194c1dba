"""transformers' own vision tower on our samples: the yardstick of the CPU part of `rb bench kernels`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_rb.checkpoint.hf.oracle import load_transformers
from megatron_rb.checkpoint.hf.training import example_model
from megatron_rb.data.sample import EncodedSample
from megatron_rb.shapes.families import FAMILIES, ExampleSizes

_TOKENS = {"image_token_id": 127, "video_token_id": 126, "vision_start_token_id": 125, "vision_end_token_id": 124}
NARROWER = 4
"""What the sizes are divided by in the narrow model; heads too, so that their size stays."""


def write_tower_model(folder: str | Path, family: str, *, narrow: bool) -> None:
    """Save a randomly initialised model whose tower has the widths of the published one and two layers.

    One layer has full attention and the other windows, where the family has them; one has a DeepStack merger; the
    language model is as small as can be.
    """
    cut = NARROWER if narrow else 1
    hidden, ffn = FAMILIES[family].tower_widths
    sizes = ExampleSizes(
        vision_layers=2,
        vision_hidden=hidden // cut,
        vision_heads=16 // cut,
        vision_ffn=ffn // cut,
        text_layers=1,
        text_hidden=256,
        text_heads=4,
        text_kv_heads=2,
        text_ffn=256,
        vocab_size=128,
        position_grid_side=48,
        deepstack_layers=(0,),
        full_attention_layers=(1,),
        max_positions=512,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        example_model(family, sizes, _TOKENS).float().save_pretrained(folder)


class TransformersTower:
    """Forward and backward pass of the tower over all images at once, in fp32."""

    def __init__(self, folder: str | Path, samples: Sequence[EncodedSample]) -> None:
        self.tower = load_transformers(folder).train().model.visual
        grids = [(grid.t, grid.h, grid.w) for sample in samples for grid in sample.grids]
        self.grids = torch.tensor(grids)
        pixels = [torch.from_numpy(array) for sample in samples for array in sample.pixels or []]
        self.pixels = torch.cat(pixels)

    def __call__(self) -> float:
        """Half the sum of all squared outputs, of which the gradients are taken."""
        self.tower.zero_grad(set_to_none=True)
        out = self.tower(self.pixels, grid_thw=self.grids)
        features = [out.pooler_output, *(getattr(out, "deepstack_features", None) or [])]
        loss = torch.stack([feature.square().sum() for feature in features]).sum() / 2
        loss.backward()
        return float(loss.detach())
