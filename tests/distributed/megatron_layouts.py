"""The weights of a Hugging Face model as megatron-core's layers hold them, by the module names of its peers."""

from __future__ import annotations

from typing import Any

import torch

Tensors = dict[str, torch.Tensor]
Layouts = dict[str, torch.Tensor | tuple[torch.Tensor, torch.Tensor]]
"""Whole values by key; gate and up of a gated layer as a pair."""
VISUAL, TEXT = "model.visual", "model.language_model"


def layouts(hf: Tensors, config: Any) -> Layouts:
    """Every parameter as megatron-core's layers hold it."""
    found: Layouts = {
        "language_model.embedding.word_embeddings.weight": hf[f"{TEXT}.embed_tokens.weight"],
        "language_model.decoder.final_layernorm.weight": hf[f"{TEXT}.norm.weight"],
        "language_model.output_layer.weight": hf["lm_head.weight"],
    }
    for layer in range(config.text_config.num_hidden_layers):
        _text_layer(found, hf, config, f"language_model.decoder.layers.{layer}", f"{TEXT}.layers.{layer}")
    for layer in range(config.vision_config.depth):
        _vision_layer(found, hf, config, f"vision_model.decoder.layers.{layer}", f"{VISUAL}.blocks.{layer}")
    _around_vision(found, hf, config)
    return found


def _text_layer(found: Layouts, hf: Tensors, config: Any, key: str, source: str) -> None:
    for kind in ("weight", "bias"):
        if f"{source}.self_attn.q_proj.{kind}" in hf:
            q, k, v = (hf[f"{source}.self_attn.{part}_proj.{kind}"] for part in "qkv")
            groups = config.text_config.num_key_value_heads
            by_group = [torch.cat(parts) for parts in zip(*(part.chunk(groups) for part in (q, k, v)), strict=True)]
            found[f"{key}.self_attention.linear_qkv.{kind}"] = torch.cat(by_group)
    for part in "qk":
        if f"{source}.self_attn.{part}_norm.weight" in hf:
            found[f"{key}.self_attention.{part}_layernorm.weight"] = hf[f"{source}.self_attn.{part}_norm.weight"]
    found[f"{key}.input_layernorm.weight"] = hf[f"{source}.input_layernorm.weight"]
    found[f"{key}.pre_mlp_layernorm.weight"] = hf[f"{source}.post_attention_layernorm.weight"]
    found[f"{key}.self_attention.linear_proj.weight"] = hf[f"{source}.self_attn.o_proj.weight"]
    found[f"{key}.mlp.linear_fc1.weight"] = (hf[f"{source}.mlp.gate_proj.weight"], hf[f"{source}.mlp.up_proj.weight"])
    found[f"{key}.mlp.linear_fc2.weight"] = hf[f"{source}.mlp.down_proj.weight"]


def _vision_layer(found: Layouts, hf: Tensors, config: Any, key: str, source: str) -> None:
    heads = config.vision_config.num_heads
    for kind in ("weight", "bias"):
        whole = hf[f"{source}.attn.qkv.{kind}"]
        by_part = whole.view(3, heads, -1, *whole.shape[1:])
        found[f"{key}.self_attention.linear_qkv.{kind}"] = by_part.transpose(0, 1).reshape(whole.shape)
        found[f"{key}.self_attention.linear_proj.{kind}"] = hf[f"{source}.attn.proj.{kind}"]
        if config.model_type == "qwen2_5_vl":
            gate, up = (hf[f"{source}.mlp.{part}_proj.{kind}"] for part in ("gate", "up"))
            found[f"{key}.mlp.linear_fc1.{kind}"] = (gate, up)
            found[f"{key}.mlp.linear_fc2.{kind}"] = hf[f"{source}.mlp.down_proj.{kind}"]
        else:
            for number in (1, 2):
                found[f"{key}.mlp.linear_fc{number}.{kind}"] = hf[f"{source}.mlp.linear_fc{number}.{kind}"]
        for norm, name in (("norm1", "input_layernorm"), ("norm2", "pre_mlp_layernorm")):
            if f"{source}.{norm}.{kind}" in hf:
                found[f"{key}.{name}.{kind}"] = hf[f"{source}.{norm}.{kind}"]


def _around_vision(found: Layouts, hf: Tensors, config: Any) -> None:
    is_qwen3 = config.model_type == "qwen3_vl"
    norm, fc1, fc2 = ("norm", "linear_fc1", "linear_fc2") if is_qwen3 else ("ln_q", "mlp.0", "mlp.2")
    for kind in ("weight", "bias"):
        for module, source in (("patch_embed.proj", "patch_embed.proj"), ("pos_embed", "pos_embed")):
            _copy(found, hf, f"vision_model.{module}.{kind}", f"{VISUAL}.{source}.{kind}")
        for target, name in (("decoder.final_layernorm", norm), ("merger.patch_norm", norm)):
            _copy(found, hf, f"vision_model.{target}.{kind}", f"{VISUAL}.merger.{name}.{kind}")
        for number, name in ((1, fc1), (2, fc2)):
            for target in (f"projection.encoder.linear_fc{number}", f"merger.linear_fc{number}"):
                _copy(found, hf, f"vision_model.{target}.{kind}", f"{VISUAL}.merger.{name}.{kind}")
        for number in range(len(getattr(config.vision_config, "deepstack_visual_indexes", []))):
            merger = f"vision_model.decoder.deepstack_merger_list.{number}"
            source = f"{VISUAL}.deepstack_merger_list.{number}"
            for target in (f"{merger}.patch_norm", f"vision_model.decoder.deepstack_norm_list.{number}"):
                _copy(found, hf, f"{target}.{kind}", f"{source}.norm.{kind}")
            for number in (1, 2):
                for target in (f"{merger}.linear_fc{number}", f"{merger}.encoder.linear_fc{number}"):
                    _copy(found, hf, f"{target}.{kind}", f"{source}.linear_fc{number}.{kind}")


def _copy(found: Layouts, hf: Tensors, key: str, source: str) -> None:
    if source in hf:
        found[key] = hf[source]
