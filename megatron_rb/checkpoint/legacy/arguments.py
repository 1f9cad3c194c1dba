"""The training arguments of a legacy checkpoint: plain values of them, and whether they describe the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from megatron_rb.checkpoint.legacy.tree import LegacyTree
from megatron_rb.checkpoint.storage.restricted import Opaque
from megatron_rb.shapes.families import FAMILIES
from megatron_rb.shapes.shape import RoboBrainShape


def plain_value(value: Any) -> Any:
    """A value as JSON knows it; stand-ins become the name of their type, with their arguments."""
    if isinstance(value, bool | int | float | str | None):
        return value
    if isinstance(value, list | tuple | set | frozenset):
        return [plain_value(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): plain_value(item) for key, item in value.items()}
    if isinstance(value, Opaque):
        arguments = ", ".join(str(plain_value(item)) for item in value.args)
        return f"{value.type_name.rpartition('.')[2]}({arguments})"
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else str(value)


def check_arguments(tree: LegacyTree, shape: RoboBrainShape) -> list[str]:
    """Compare the arguments with the model of `config.json`; returns warnings.

    Raises:
        ValueError: they describe another model.
    """
    args, text = tree.first.args, shape.text
    if not shape.traits.legacy_checkpoints:
        known = ", ".join(
            f"{family.name} ({family.models})" for family in FAMILIES.values() if family.legacy_checkpoints
        )
        raise ValueError(f"config.json describes a {shape.family} model; legacy checkpoints are read of {known}")
    if text.num_query_groups % tree.tp_size or shape.vision.num_heads % tree.tp_size:
        raise ValueError(
            f"{tree.folder} is cut for {tree.tp_size} tensor-parallel ranks, which does not divide the "
            f"{text.num_query_groups} query groups and {shape.vision.num_heads} vision heads of config.json; it is of "
            "another model"
        )
    wrong = disagreements(args, shape)
    if wrong:
        raise ValueError(
            f"{tree.first.file.path} was trained with {', '.join(wrong)}; give the config.json of the model that was "
            "trained"
        )
    return _warnings(tree, args)


def disagreements(args: Mapping[str, Any], shape: RoboBrainShape) -> list[str]:
    """What training arguments say otherwise than `config.json`; arguments that are not there say nothing."""
    text = shape.text
    expected = {
        "num_layers": text.num_layers,
        "hidden_size": text.hidden_size,
        "ffn_hidden_size": text.ffn_hidden_size,
        "num_attention_heads": text.num_heads,
        "kv_channels": text.head_dim,
        "untie_embeddings_and_output_weights": not text.tied_embeddings,
        "swiglu": True,
        "normalization": "RMSNorm",
        "add_qkv_bias": text.qkv_bias,
        "qk_layernorm": text.qk_norm,
        "num_experts": None,
    }
    if args.get("group_query_attention"):
        expected["num_query_groups"] = text.num_query_groups
    return [
        f"{name} {args[name]} instead of {value}"
        for name, value in expected.items()
        if args.get(name) is not None and args[name] != value
    ]


def _warnings(tree: LegacyTree, args: Mapping[str, Any]) -> list[str]:
    warnings = []
    if not args:
        warnings.append("the checkpoint holds no training arguments: sizes are checked against config.json alone")
    if tree.is_release and tree.tp_size > 1:
        warnings.append(
            f"the checkpoint is an untrained release for {tree.tp_size} tensor-parallel ranks: FlagScale's "
            "importer cuts "
            "the vision linear_fc1.bias as one vector, so these biases may sit on the wrong rows; convert the Hugging "
            "Face folder that it was made from instead"
        )
    if args.get("fp8"):
        warnings.append(f"it was trained with fp8 {args['fp8']}: the bf16 parameters are read, fp8 scales are left out")
    return warnings
