"""transformers' own vision tower on our samples: the yardstick of the CPU part of `rb bench kernels`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from megatron_rb.checkpoint.hf.oracle import load_transformers
from megatron_rb.data.sample import EncodedSample

_TEXT: dict[str, Any] = dict(
    vocab_size=128,
    hidden_size=256,
    intermediate_size=256,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    bos_token_id=None,
    eos_token_id=None,
)
_SHARED: dict[str, Any] = dict(depth=2, num_heads=16, spatial_merge_size=2, temporal_patch_size=2, out_hidden_size=256)
_TOKENS: dict[str, Any] = dict(
    image_token_id=127, video_token_id=126, vision_start_token_id=125, vision_end_token_id=124
)
WIDTHS = {"qwen2_5_vl": (1280, 3420), "qwen3_vl": (1152, 4304)}
"""Hidden and ffn size of the published towers (RoboBrain 2.0, 2.5 8B)."""
NARROWER = 4
"""What the sizes are divided by in the narrow model; heads too, so that their size stays."""


def write_tower_model(folder: str | Path, family: str, *, narrow: bool) -> None:
    """Save a randomly initialised model whose tower has the widths of the published one and two layers.

    Of Qwen2.5-VL one layer has windows and one full attention; the language model is as small as can be.
    """
    hidden, ffn = WIDTHS[family]
    cut = NARROWER if narrow else 1
    vision = dict(_SHARED, hidden_size=hidden // cut, intermediate_size=ffn // cut, num_heads=16 // cut)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e6}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if family == "qwen2_5_vl":
            vision |= dict(patch_size=14, window_size=112, fullatt_block_indexes=[1], tokens_per_second=2)
            text = dict(_TEXT, rope_parameters=rope | {"mrope_section": [8, 12, 12]})
            config = Qwen2_5_VLConfig(vision_config=vision, text_config=text, **_TOKENS)
            model: Any = Qwen2_5_VLForConditionalGeneration(config)
        else:
            vision |= dict(patch_size=16, num_position_embeddings=2304, deepstack_visual_indexes=[0])
            rope |= {"mrope_section": [12, 10, 10], "mrope_interleaved": True}
            text = dict(_TEXT, head_dim=64, rope_parameters=rope)
            model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(vision_config=vision, text_config=text, **_TOKENS))
    model.float().save_pretrained(folder)


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
