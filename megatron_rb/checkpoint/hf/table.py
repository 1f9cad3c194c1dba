"""The weight table: every parameter of this stack, the Hugging Face tensors it is made of, the way in both directions.

One rule knows how to join and how to split, so import and export cannot drift apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from megatron_rb.models.robobrain.config import RoboBrainShape

VISUAL, TEXT = "model.visual", "model.language_model"


@dataclass(frozen=True)
class WeightRule:
    """One native parameter (full, unpadded) and its Hugging Face sources."""

    hf_names: tuple[str, ...]
    join: Callable[[Sequence[torch.Tensor]], torch.Tensor]
    split: Callable[[torch.Tensor], list[torch.Tensor]]


def weight_table(shape: RoboBrainShape) -> dict[str, WeightRule]:
    """All rules by native parameter name."""
    table: dict[str, WeightRule] = {}
    _add_patch_embed(table, shape)
    for index in range(shape.vision.num_layers):
        _add_vision_layer(table, shape, f"vision.layers.{index}", f"{VISUAL}.blocks.{index}")
    _add_mergers(table, shape)
    _copy(table, "language.embedding.tokens.weight", f"{TEXT}.embed_tokens.weight")
    for index in range(shape.text.num_layers):
        _add_decoder_layer(table, shape, f"language.layers.{index}", f"{TEXT}.layers.{index}")
    _copy(table, "language.head.norm.weight", f"{TEXT}.norm.weight")
    head_source = f"{TEXT}.embed_tokens.weight" if shape.text.tied_embeddings else "lm_head.weight"
    _copy(table, "language.head.output.weight", head_source)
    return table


def _copy(table: dict[str, WeightRule], native: str, hf_name: str) -> None:
    table[native] = WeightRule((hf_name,), lambda parts: parts[0], lambda full: [full])


def _copy_module(table: dict[str, WeightRule], native: str, hf_name: str, bias: bool) -> None:
    for field in ("weight", "bias") if bias else ("weight",):
        _copy(table, f"{native}.{field}", f"{hf_name}.{field}")


def _stack(table: dict[str, WeightRule], native: str, hf_names: Sequence[str], bias: bool) -> None:
    """Several tensors of one size below each other (gate and up projection)."""
    for field in ("weight", "bias") if bias else ("weight",):
        names = tuple(f"{name}.{field}" for name in hf_names)
        table[f"{native}.{field}"] = WeightRule(
            names, lambda parts: torch.cat(list(parts)), lambda full: list(full.chunk(len(hf_names)))
        )


def _add_patch_embed(table: dict[str, WeightRule], shape: RoboBrainShape) -> None:
    vision = shape.vision
    kernel = (vision.hidden_size, vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    table["vision.patch_embed.weight"] = WeightRule(
        (f"{VISUAL}.patch_embed.proj.weight",),
        lambda parts: parts[0].reshape(vision.hidden_size, -1),
        lambda full: [full.reshape(kernel)],
    )
    if vision.patch_bias:
        _copy(table, "vision.patch_embed.bias", f"{VISUAL}.patch_embed.proj.bias")
    if vision.position_grid_side:
        _copy(table, "vision.patch_embed.position", f"{VISUAL}.pos_embed.weight")


def _add_vision_layer(table: dict[str, WeightRule], shape: RoboBrainShape, native: str, hf: str) -> None:
    vision = shape.vision
    norm_bias = vision.norm == "layernorm"
    _copy_module(table, f"{native}.norm1", f"{hf}.norm1", norm_bias)
    _copy_module(table, f"{native}.norm2", f"{hf}.norm2", norm_bias)
    heads, size = vision.num_heads, vision.head_dim
    for field in ("weight", "bias"):
        # Hugging Face: all queries, all keys, all values; here head by head, so that tensor parallelism cuts heads.
        table[f"{native}.attention.linear_qkv.{field}"] = WeightRule(
            (f"{hf}.attn.qkv.{field}",),
            lambda parts: parts[0].unflatten(0, (3, heads, size)).transpose(0, 1).flatten(0, 2),
            lambda full: [full.unflatten(0, (heads, 3, size)).transpose(0, 1).flatten(0, 2)],
        )
    _copy_module(table, f"{native}.attention.linear_proj", f"{hf}.attn.proj", True)
    if vision.gated_mlp:
        _stack(table, f"{native}.mlp.linear_fc1", [f"{hf}.mlp.gate_proj", f"{hf}.mlp.up_proj"], True)
        _copy_module(table, f"{native}.mlp.linear_fc2", f"{hf}.mlp.down_proj", True)
    else:
        _copy_module(table, f"{native}.mlp.linear_fc1", f"{hf}.mlp.linear_fc1", True)
        _copy_module(table, f"{native}.mlp.linear_fc2", f"{hf}.mlp.linear_fc2", True)


def _add_mergers(table: dict[str, WeightRule], shape: RoboBrainShape) -> None:
    norm_bias = shape.vision.norm == "layernorm"
    if shape.family == "qwen2_5_vl":
        names = {"norm": "ln_q", "linear_fc1": "mlp.0", "linear_fc2": "mlp.2"}
    else:
        names = {"norm": "norm", "linear_fc1": "linear_fc1", "linear_fc2": "linear_fc2"}
    places = {"vision.merger": f"{VISUAL}.merger"}
    for tap in range(len(shape.vision.deepstack_layers)):
        places[f"vision.deepstack.{tap}"] = f"{VISUAL}.deepstack_merger_list.{tap}"
    for native, hf in places.items():
        _copy_module(table, f"{native}.norm", f"{hf}.{names['norm']}", norm_bias)
        for linear in ("linear_fc1", "linear_fc2"):
            _copy_module(table, f"{native}.{linear}", f"{hf}.{names[linear]}", True)


def _add_decoder_layer(table: dict[str, WeightRule], shape: RoboBrainShape, native: str, hf: str) -> None:
    text = shape.text
    _copy_module(table, f"{native}.input_norm", f"{hf}.input_layernorm", False)
    _copy_module(table, f"{native}.post_attention_norm", f"{hf}.post_attention_layernorm", False)
    for field in ("weight", "bias") if text.qkv_bias else ("weight",):
        names = tuple(f"{hf}.self_attn.{part}_proj.{field}" for part in "qkv")
        table[f"{native}.attention.linear_qkv.{field}"] = WeightRule(
            names,
            lambda parts: _join_groups(parts, text.num_query_groups, text.head_dim),
            lambda full: _split_groups(full, text.num_query_groups, text.head_dim),
        )
    if text.qk_norm:
        for part in "qk":
            _copy(table, f"{native}.attention.{part}_layernorm.weight", f"{hf}.self_attn.{part}_norm.weight")
    _copy_module(table, f"{native}.attention.linear_proj", f"{hf}.self_attn.o_proj", text.proj_bias)
    _stack(table, f"{native}.mlp.linear_fc1", [f"{hf}.mlp.gate_proj", f"{hf}.mlp.up_proj"], False)
    _copy_module(table, f"{native}.mlp.linear_fc2", f"{hf}.mlp.down_proj", False)


def _join_groups(parts: Sequence[torch.Tensor], groups: int, head_dim: int) -> torch.Tensor:
    """Separate q, k, v projections to megatron-core's order: group by group its queries, its key, its value."""
    q, k, v = (part.unflatten(0, (groups, -1, head_dim)) for part in parts)
    return torch.cat([q, k, v], dim=1).flatten(0, 2)


def _split_groups(full: torch.Tensor, groups: int, head_dim: int) -> list[torch.Tensor]:
    grouped = full.unflatten(0, (groups, -1, head_dim))
    parts = (grouped[:, :-2], grouped[:, -2:-1], grouped[:, -1:])
    return [part.flatten(0, 2).contiguous() for part in parts]
