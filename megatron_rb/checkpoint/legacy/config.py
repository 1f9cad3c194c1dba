"""The config.json that a legacy checkpoint of Qwen2.5-VL does not have, from its arguments and shapes."""

from __future__ import annotations

import re
from typing import Any

from megatron_rb.checkpoint.legacy.tree import LegacyTree
from megatron_rb.checkpoint.storage.tensors import StoredTensor

LAYER = re.compile(r"vision_model\.decoder\.layers\.(\d+)\.")
VISION_HEADS = 16
WINDOW_PATCHES = 8
FULL_ATTENTION_EVERY = 8
"""What all published Qwen2.5-VL models have and no legacy checkpoint states."""
SPECIAL_TOKENS = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}
NEEDED = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")


def derive_config(tree: LegacyTree) -> dict[str, Any]:
    """The content of a config.json for the model of a legacy checkpoint.

    Vision heads, windows, special tokens and the rotary base, where `args` lacks it, are those of the published models;
    the vocabulary is that of the embedding, padding included.

    Raises:
        ValueError: the files do not tell enough.
    """
    args, state = tree.first.args, tree.first.chunks[0]
    lacking = [name for name in NEEDED if not args.get(name)]
    patch, embedding = (
        state.get("vision_model.patch_embed.proj.weight"),
        state.get("language_model.embedding.word_embeddings.weight"),
    )
    fc1, merger = _first(state, "mlp.linear_fc1.weight"), state.get("vision_model.projection.encoder.linear_fc1.weight")
    known = all(isinstance(tensor, StoredTensor) for tensor in (patch, embedding, fc1, merger))
    if lacking or not known or len(patch.shape) != 5 or patch.shape[0] % VISION_HEADS:  # type: ignore[union-attr]
        what = ", ".join(lacking) or "the shapes of the vision tower"
        raise ValueError(
            f"{tree.folder} does not tell {what} of its model; name the Hugging Face folder it was made from with --hf"
        )
    assert patch is not None and embedding is not None and merger is not None
    width, channels, temporal, size = patch.shape[:4]
    layers = {int(match.group(1)) for key in state if (match := LAYER.match(key))}
    depth, heads = max(layers) + 1, args["num_attention_heads"]
    groups = args.get("num_query_groups") if args.get("group_query_attention", True) else None
    return {
        "model_type": "qwen2_5_vl",
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "tie_word_embeddings": not args.get("untie_embeddings_and_output_weights", True),
        "vocab_size": embedding.shape[0] * tree.tp_size,
        "hidden_size": args["hidden_size"],
        "intermediate_size": args["ffn_hidden_size"],
        "num_hidden_layers": args["num_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": groups or heads,
        "hidden_act": "silu",
        "rms_norm_eps": args.get("norm_epsilon") or args.get("layernorm_epsilon") or 1e-6,
        "rope_theta": float(args.get("rotary_base") or 1e6),
        "rope_scaling": {"type": "mrope", "mrope_section": list(args.get("mrope_section") or (16, 24, 24))},
        "max_position_embeddings": args.get("max_position_embeddings") or 128000,
        **SPECIAL_TOKENS,
        "vision_config": {
            "model_type": "qwen2_5_vl",
            "depth": depth,
            "hidden_size": width,
            "num_heads": VISION_HEADS,
            "intermediate_size": fc1.shape[0] * tree.tp_size // 2,  # type: ignore[union-attr]
            "hidden_act": "silu",
            "patch_size": size,
            "temporal_patch_size": temporal,
            "in_chans": channels,
            "spatial_merge_size": round((merger.shape[1] / width) ** 0.5),
            "out_hidden_size": args["hidden_size"],
            "window_size": WINDOW_PATCHES * size,
            "fullatt_block_indexes": list(range(FULL_ATTENTION_EVERY - 1, depth, FULL_ATTENTION_EVERY)),
            "tokens_per_second": 2,
        },
    }


def _first(state: Any, ending: str) -> StoredTensor | None:
    key = f"vision_model.decoder.layers.0.{ending}"
    return state.get(key)
