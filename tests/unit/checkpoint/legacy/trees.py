"""Legacy Megatron checkpoints as FlagScale and Pai-Megatron-Patch write them, cut straight from Hugging Face tensors.

Nothing here knows the reader or the weight table: names and cuts follow the peers' converters and modules.
"""

from __future__ import annotations

import argparse
import contextlib
import enum
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

Tensors = dict[str, torch.Tensor]
TRACKER = "latest_checkpointed_iteration.txt"
VISION_LAYERS, VISION_HEADS, VISION_HIDDEN = 3, 4, 32
HEADS, HIDDEN, FFN, VOCABULARY = 4, 64, 96, 120


def write_hf_folder(
    folder: Path, text_layers: int = 4, tied: bool = False, vision_ffn: int = 52, query_groups: int = 2
) -> Tensors:
    """A tiny Hugging Face Qwen2.5-VL in bf16; returns the fp32 tensors that its weights are rounded from."""
    torch.manual_seed(text_layers + 2 * tied + vision_ffn)
    config = Qwen2_5_VLConfig(
        vision_config=dict(
            depth=VISION_LAYERS,
            hidden_size=VISION_HIDDEN,
            intermediate_size=vision_ffn,
            num_heads=VISION_HEADS,
            patch_size=4,
            spatial_merge_size=2,
            temporal_patch_size=2,
            out_hidden_size=HIDDEN,
            window_size=16,
            fullatt_block_indexes=[1],
            tokens_per_second=2,
        ),
        text_config=dict(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=FFN,
            num_hidden_layers=text_layers,
            num_attention_heads=HEADS,
            num_key_value_heads=query_groups,
            rms_norm_eps=1e-6,
            max_position_embeddings=4096,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 2, 2]},
        ),
        tie_word_embeddings=tied,
        image_token_id=11,
        video_token_id=12,
        vision_start_token_id=13,
        vision_end_token_id=14,
    )
    names = {name: value.shape for name, value in Qwen2_5_VLForConditionalGeneration(config).named_parameters()}
    exact = {name: 0.2 * torch.randn(shape) + (len(shape) == 1) for name, shape in names.items()}
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    save_file(rounded(exact), folder / "model.safetensors")
    return exact


def rounded(exact: Tensors) -> Tensors:
    return {name: value.bfloat16() for name, value in exact.items()}


def random_like(tensors: Tensors, seed: int) -> Tensors:
    """Other fp32 values for every tensor, all positive."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(value.shape, generator=generator) for name, value in tensors.items()}


@dataclass(frozen=True)
class Tree:
    """How a legacy checkpoint is laid out."""

    tp: int = 1
    pp: int = 1
    chunk_layers: tuple[tuple[int, ...], ...] = ((4,),)
    """Text layers per stage and virtual chunk."""
    transformer_engine: bool = True
    iteration: int | None = 3
    """None = a release."""
    device_tag: str = "cpu"
    padded_vocabulary: int = VOCABULARY
    padded_vision_ffn: int = 0
    """0 = not padded."""
    tied: bool = False
    tied_copy: bool = True
    """The last stage holds its copy of tied embeddings."""
    zero_centered: bool = False
    args: Mapping[str, Any] = field(default_factory=dict)

    @property
    def virtual(self) -> bool:
        return len(self.chunk_layers[0]) > 1

    @property
    def text_layers(self) -> int:
        return sum(map(sum, self.chunk_layers))

    def layers(self, stage: int, chunk: int) -> range:
        """Global numbers of the layers of a chunk: chunk 0 of every stage comes before chunk 1 of any."""
        before = sum(row[c] for c in range(chunk) for row in self.chunk_layers)
        before += sum(row[chunk] for row in self.chunk_layers[:stage])
        return range(before, before + self.chunk_layers[stage][chunk])


EVEN = Tree(tp=2, pp=2, chunk_layers=((2,), (2,)))
UNEVEN = Tree(tp=2, pp=2, chunk_layers=((1,), (3,)), args={"decoder_first_pipeline_num_layers": 1})
VIRTUAL = Tree(tp=2, pp=2, chunk_layers=((1, 1), (1, 1)), args={"num_layers_per_virtual_pipeline_stage": 1})
UNEVEN_VIRTUAL = Tree(pp=2, chunk_layers=((1, 1), (2, 2)), args={"decoder_first_pipeline_num_layers": 2})


# One rank's state dict


def chunk_state(hf: Tensors, tree: Tree, tp_rank: int, stage: int, chunk: int) -> OrderedDict[str, Any]:
    """The state dict of one model chunk of one rank, in the order of the model's modules."""
    state: OrderedDict[str, Any] = OrderedDict()
    is_first = (stage, chunk) == (0, 0)
    is_last = (stage, chunk) == (tree.pp - 1, len(tree.chunk_layers[0]) - 1)
    if is_first:
        _vision(state, hf, tree, tp_rank)
        table = _padded_rows(hf["model.language_model.embed_tokens.weight"], tree.padded_vocabulary)
        state["language_model.embedding.word_embeddings.weight"] = table.chunk(tree.tp)[tp_rank]
    for local, number in enumerate(tree.layers(stage, chunk)):
        _text_layer(state, hf, tree, tp_rank, local, number)
    if is_last:
        _norm(
            state, "language_model.decoder.final_layernorm", hf["model.language_model.norm.weight"], tree.zero_centered
        )
        if not tree.tied:
            _head(state, hf["lm_head.weight"], tree, tp_rank)
        elif tree.pp > 1 and tree.tied_copy:
            _head(state, hf["model.language_model.embed_tokens.weight"], tree, tp_rank)
    return OrderedDict((key, value if value is None else value.clone()) for key, value in state.items())


def _head(state: dict, weight: torch.Tensor, tree: Tree, tp_rank: int) -> None:
    state["language_model.output_layer.weight"] = _padded_rows(weight, tree.padded_vocabulary).chunk(tree.tp)[tp_rank]


def _padded_rows(weight: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.cat([weight, torch.full((rows - len(weight), *weight.shape[1:]), 0.5, dtype=weight.dtype)])


def _norm(state: dict, prefix: str, weight: torch.Tensor, zero_centered: bool, name: str = "weight") -> None:
    state[f"{prefix}.{name}"] = weight - 1 if zero_centered else weight


def _vision(state: dict, hf: Tensors, tree: Tree, tp_rank: int) -> None:
    source, target = "model.visual", "vision_model"
    state[f"{target}.rotary_pos_emb.inv_freq"] = torch.arange(4.0)
    state[f"{target}.patch_embed.proj.weight"] = hf[f"{source}.patch_embed.proj.weight"]
    for index in range(VISION_LAYERS):
        block, layer = f"{source}.blocks.{index}", f"{target}.decoder.layers.{index}"
        qkv = {}
        for kind in ("weight", "bias"):
            whole = hf[f"{block}.attn.qkv.{kind}"]
            parts = whole.view(3, VISION_HEADS, -1, *whole.shape[1:])
            heads = [torch.cat([parts[part, head] for part in range(3)]) for head in range(VISION_HEADS)]
            qkv[kind] = torch.cat(heads[tp_rank * len(heads) // tree.tp : (tp_rank + 1) * len(heads) // tree.tp])
        fc1 = {kind: _gate_up(hf, f"{block}.mlp", kind, tree, tp_rank) for kind in ("weight", "bias")}
        down = hf[f"{block}.mlp.down_proj.weight"]
        if tree.padded_vision_ffn:
            down = torch.nn.functional.pad(down, (0, tree.padded_vision_ffn - down.shape[1]))
        _layer(
            state,
            layer,
            tree.transformer_engine,
            False,
            norms=(hf[f"{block}.norm1.weight"], hf[f"{block}.norm2.weight"]),
            proj={
                "weight": hf[f"{block}.attn.proj.weight"].chunk(tree.tp, 1)[tp_rank],
                "bias": hf[f"{block}.attn.proj.bias"],
            },
            qkv=qkv,
            fc1=fc1,
            fc2={"weight": down.chunk(tree.tp, 1)[tp_rank], "bias": hf[f"{block}.mlp.down_proj.bias"]},
        )
    _norm(state, f"{target}.decoder.final_layernorm", hf[f"{source}.merger.ln_q.weight"], False)
    for number, name in enumerate(("mlp.0", "mlp.2"), start=1):
        prefix = f"{target}.projection.encoder.linear_fc{number}"
        weight, bias = (hf[f"{source}.merger.{name}.{kind}"] for kind in ("weight", "bias"))
        state[f"{prefix}.weight"] = weight.chunk(tree.tp, number - 1)[tp_rank]
        state[f"{prefix}.bias"] = bias.chunk(tree.tp)[tp_rank] if number == 1 else bias
        state[f"{prefix}._extra_state"] = None


def _gate_up(hf: Tensors, mlp: str, kind: str, tree: Tree, tp_rank: int) -> torch.Tensor:
    parts = []
    for projection in ("gate_proj", "up_proj"):
        value = hf[f"{mlp}.{projection}.{kind}"]
        if tree.padded_vision_ffn and "visual" in mlp:
            value = torch.cat([value, value.new_zeros(tree.padded_vision_ffn - len(value), *value.shape[1:])])
        parts.append(value.chunk(tree.tp)[tp_rank])
    return torch.cat(parts)


def _text_layer(state: dict, hf: Tensors, tree: Tree, tp_rank: int, local: int, number: int) -> None:
    block = f"model.language_model.layers.{number}"
    size = HIDDEN // HEADS
    qkv = {}
    for kind in ("weight", "bias"):
        q, k, v = (hf[f"{block}.self_attn.{part}_proj.{kind}"] for part in "qkv")
        groups = len(k) // size
        per_group = [
            torch.cat([q.chunk(groups)[group], k.chunk(groups)[group], v.chunk(groups)[group]])
            for group in range(groups)
        ]
        qkv[kind] = torch.cat(per_group[tp_rank * groups // tree.tp : (tp_rank + 1) * groups // tree.tp])
    _layer(
        state,
        f"language_model.decoder.layers.{local}",
        tree.transformer_engine,
        tree.zero_centered,
        norms=(hf[f"{block}.input_layernorm.weight"], hf[f"{block}.post_attention_layernorm.weight"]),
        proj={"weight": hf[f"{block}.self_attn.o_proj.weight"].chunk(tree.tp, 1)[tp_rank]},
        qkv=qkv,
        fc1={"weight": _gate_up(hf, f"{block}.mlp", "weight", tree, tp_rank)},
        fc2={"weight": hf[f"{block}.mlp.down_proj.weight"].chunk(tree.tp, 1)[tp_rank]},
    )


def _layer(
    state: dict,
    layer: str,
    transformer_engine: bool,
    zero_centered: bool,
    *,
    norms: tuple,
    proj: Tensors,
    qkv: Tensors,
    fc1: Tensors,
    fc2: Tensors,
) -> None:
    """One transformer layer with its modules in megatron-core's order."""
    attention, mlp = f"{layer}.self_attention", f"{layer}.mlp"
    if not transformer_engine:
        _norm(state, f"{layer}.input_layernorm", norms[0], zero_centered)
    if transformer_engine:
        state[f"{attention}.core_attention._extra_state"] = None
    state.update({f"{attention}.linear_proj.{kind}": value for kind, value in proj.items()})
    state[f"{attention}.linear_proj._extra_state"] = None
    if transformer_engine:
        _norm(state, f"{attention}.linear_qkv", norms[0], zero_centered, "layer_norm_weight")
    state.update({f"{attention}.linear_qkv.{kind}": value for kind, value in qkv.items()})
    state[f"{attention}.linear_qkv._extra_state"] = torch.zeros(5, dtype=torch.uint8)
    if not transformer_engine:
        _norm(state, f"{layer}.pre_mlp_layernorm", norms[1], zero_centered)
    else:
        _norm(state, f"{mlp}.linear_fc1", norms[1], zero_centered, "layer_norm_weight")
    state.update({f"{mlp}.linear_fc1.{kind}": value for kind, value in fc1.items()})
    state[f"{mlp}.linear_fc1._extra_state"] = None
    state.update({f"{mlp}.linear_fc2.{kind}": value for kind, value in fc2.items()})
    state[f"{mlp}.linear_fc2._extra_state"] = None


def is_parameter(key: str) -> bool:
    return not key.endswith(("_extra_state", "inv_freq"))


# Files


class Reduced:
    """Pickled as a call with these arguments."""

    def __init__(self, function: Callable, *args: Any) -> None:
        self.reduced = (function, args)

    def __reduce__(self) -> tuple:
        return self.reduced


@contextlib.contextmanager
def megatron_enum() -> Iterator[enum.Enum]:
    """An enum member that pickles as one of megatron-core's, importable only in here."""
    module = types.ModuleType("megatron.stand_in_enums")
    kind = enum.Enum("AttnBackend", {"flash": 1, "fused": 2}, module=module.__name__)
    module.AttnBackend = kind  # type: ignore[attr-defined]
    with mock.patch.dict(sys.modules, {module.__name__: module}):
        yield kind.fused  # type: ignore[attr-defined]


def training_args(tree: Tree) -> argparse.Namespace:
    args = argparse.Namespace(
        num_layers=tree.text_layers,
        hidden_size=HIDDEN,
        ffn_hidden_size=FFN,
        num_attention_heads=HEADS,
        untie_embeddings_and_output_weights=not tree.tied,
        swiglu=True,
        normalization="RMSNorm",
        add_qkv_bias=True,
        tensor_model_parallel_size=tree.tp,
        pipeline_model_parallel_size=tree.pp,
        num_experts=None,
        seed=1234,
        params_dtype=torch.bfloat16,
        consumed_train_samples=48,
        data_parallel_size=4,
        apply_layernorm_1p=tree.zero_centered,
        transformer_impl="transformer_engine" if tree.transformer_engine else "local",
    )
    vars(args).update(tree.args)
    return args


def rank_folder(folder: Path, tree: Tree, tp_rank: int, stage: int) -> Path:
    return folder / (f"mp_rank_{tp_rank:02d}" + (f"_{stage:03d}" if tree.pp > 1 else ""))


def iteration_folder(root: Path, tree: Tree) -> Path:
    return root / ("release" if tree.iteration is None else f"iter_{tree.iteration:07d}")


RankState = Callable[[int, int], Mapping[str, Any]]
"""Further entries of a rank's file by `(tp_rank, stage)`."""


def write_tree(root: Path, hf: Tensors, tree: Tree, extra: RankState | None = None) -> Path:
    """Write all ranks of a checkpoint with the weights `hf`; returns the root."""
    folder = iteration_folder(root, tree)
    for tp_rank in range(tree.tp):
        for stage in range(tree.pp):
            chunks = [chunk_state(hf, tree, tp_rank, stage, chunk) for chunk in range(len(tree.chunk_layers[0]))]
            write_rank(folder, tree, tp_rank, stage, chunks, extra(tp_rank, stage) if extra else {})
    word = "release" if tree.iteration is None else str(tree.iteration)
    (root / TRACKER).write_text(word)
    return root


def write_rank(
    folder: Path, tree: Tree, tp_rank: int, stage: int, chunks: list[OrderedDict[str, Any]], extra: Mapping[str, Any]
) -> None:
    """Write `model_optim_rng.pt` of one rank."""
    args = training_args(tree)
    args.device = Reduced(torch.device, "musa" if "musa" in tree.device_tag else "cuda", tp_rank)
    names = [f"model{number}" for number in range(len(chunks))] if tree.virtual else ["model"]
    content = {"checkpoint_version": 3.0, "iteration": tree.iteration or 0, **dict(zip(names, chunks, strict=True))}
    if tree.iteration is not None:
        content["rng_state"] = [{"torch_rng_state": torch.zeros(16, dtype=torch.uint8)}]
        content["opt_param_scheduler"] = {"max_lr": 1e-5, "num_steps": 48, "lr_decay_style": "cosine"}
        content["num_floating_point_operations_so_far"] = 1e12
    place = rank_folder(folder, tree, tp_rank, stage)
    place.mkdir(parents=True)
    with megatron_enum() as member, tagged(tree.device_tag):
        args.attention_backend = member
        torch.save(content | {"args": args} | dict(extra), place / "model_optim_rng.pt")


@contextlib.contextmanager
def tagged(tag: str) -> Iterator[None]:
    """torch.save writes this device tag for every storage, as it does on the device."""
    if tag == "cpu":
        yield
    else:
        with mock.patch("torch.serialization.location_tag", lambda storage: tag):
            yield


# Optimizer states


def plain_optimizer(
    states: Mapping[str, Tensors], tree: Tree, step_in_state: bool = False, **options: Any
) -> RankState:
    """`Float16OptimizerWithFloat16Params.state_dict()` of every rank, from Hugging Face tensors of each kind.

    Args:
        states: `param`, `exp_avg` and `exp_avg_sq`, each a whole model.
        step_in_state: as torch's AdamW counts, not as fused Adams do.
        options: `trained(key)` and `group(key, value)` decide what is trained and how it is grouped.
    """
    trained = options.get("trained", lambda key: True)
    group_of = options.get("group", lambda key, value: 0 if value.ndim > 1 and not key.endswith(".bias") else 1)

    def rank_state(tp_rank: int, stage: int) -> dict[str, Any]:
        parts = {
            kind: _ordered(hf, replace(tree, zero_centered=tree.zero_centered and kind == "param"), tp_rank, stage)
            for kind, hf in states.items()
        }
        kept = [key for key in parts["param"] if trained(key[1])]
        numbers = sorted({group_of(key[1], parts["param"][key]) for key in kept})
        groups = [[key for key in kept if group_of(key[1], parts["param"][key]) == number] for number in numbers]
        inner: dict[str, Any] = {"state": {}, "param_groups": []}
        for group in groups:
            first = len(inner["state"])
            for index, key in enumerate(group, start=first):
                inner["state"][index] = {kind: parts[kind][key] for kind in ("exp_avg", "exp_avg_sq")}
                if step_in_state:
                    inner["state"][index]["step"] = torch.tensor(7.0)
            decays = bool(group) and parts["param"][group[0]].ndim > 1
            scalars = {"wd_mult": float(decays), "lr_mult": 1.0, "lr": 1e-5, "betas": (0.9, 0.95), "eps": 1e-8}
            scalars |= {} if step_in_state else {"step": 7}
            inner["param_groups"].append(scalars | {"params": list(range(first, first + len(group)))})
        mains = [[_with_attribute(parts["param"][key]) for key in group] for group in groups]
        return {"optimizer": {"optimizer": inner, "fp32_from_fp16_params": mains}}

    return rank_state


def _with_attribute(tensor: torch.Tensor) -> torch.Tensor:
    tensor.tensor_model_parallel = True  # type: ignore[attr-defined]
    return tensor


def _ordered(hf: Tensors, tree: Tree, tp_rank: int, stage: int) -> dict[tuple[int, str], torch.Tensor]:
    return {
        (chunk, key): value
        for chunk in range(len(tree.chunk_layers[0]))
        for key, value in chunk_state(hf, tree, tp_rank, stage, chunk).items()
        if is_parameter(key)
    }
