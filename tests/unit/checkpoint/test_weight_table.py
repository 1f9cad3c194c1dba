"""The weight table: complete, its rules invertible, its sizes those of the published models."""

import math

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForImageTextToText

from megatron_rb.checkpoint.hf.names import canonical_name, exported_name
from megatron_rb.checkpoint.hf.reader import HFReader
from megatron_rb.checkpoint.hf.table import stored_rules, weight_table
from megatron_rb.platform import get_platform
from megatron_rb.platform.mcore_shims import install_mcore_shims
from megatron_rb.shapes.families import FAMILIES
from megatron_rb.shapes.published import CONFIGS, PARAMETERS
from megatron_rb.shapes.shape import load_shape, shape_from_dict
from tests.parity.tiny_models import write_model

TINY = [("qwen3_vl", 0), ("qwen3_vl", 1), ("qwen2_5_vl", 2), ("qwen2_5_vl", 3), ("qwen2_vl", 0), ("qwen2_vl", 1)]
"""Odd seeds tie the embeddings."""


@pytest.fixture(scope="module", params=TINY, ids=lambda case: f"{case[0]}-{'tied' if case[1] % 2 else 'untied'}")
def folder(request, tmp_path_factory):
    family, seed = request.param
    return write_model(tmp_path_factory.mktemp("hf") / f"{family}_{seed}", family, seed)


def test_every_tensor_of_a_folder_is_used_once(folder):
    shape = load_shape(folder)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        stored = sorted(canonical_name(name) for name in file.keys())
    rules = weight_table(shape)
    if shape.text.tied_embeddings:
        rules.pop("language.head.output.weight")  # the same tensor as the embedding
    assert sorted(name for rule in rules.values() for name in rule.hf_names) == stored


def test_splitting_undoes_joining(folder):
    reader = HFReader(folder, load_shape(folder))
    for name, rule in reader.rules.items():
        parts = [reader.read_hf(hf_name) for hf_name in rule.hf_names]
        full = rule.join(parts)
        assert all(torch.equal(a, b) for a, b in zip(rule.split(full), parts, strict=True)), name
        assert torch.equal(rule.join(rule.split(full)), full), name


@pytest.mark.parametrize("family", list(FAMILIES))
def test_exported_names_lead_back(family):
    names = ("model.visual.blocks.0.norm1.weight", "model.language_model.layers.3.mlp.up_proj.weight", "lm_head.weight")
    assert [canonical_name(exported_name(name, family)) for name in names] == list(names)


def test_qwen2_5_is_exported_as_on_the_hub():
    names = ("model.visual.merger.ln_q.weight", "model.language_model.norm.weight", "lm_head.weight")
    exported = [exported_name(name, "qwen2_5_vl") for name in names]
    assert exported == ["visual.merger.ln_q.weight", "model.norm.weight", "lm_head.weight"]


@pytest.mark.parametrize("model", PARAMETERS)
def test_published_models_have_their_number_of_weights(model):
    shape = shape_from_dict(CONFIGS[model])
    assert sum(math.prod(rule.shape) for rule in stored_rules(shape).values()) == PARAMETERS[model]


QWEN2_VL = {
    "Qwen2-VL-2B": dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12)
    | dict(num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True),
    "Qwen2-VL-7B": dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28)
    | dict(num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False),
}
"""What the config.json files on the hub state beside defaults."""


def qwen2_vl(name: str) -> dict:
    text = QWEN2_VL[name] | {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
    vision = {"hidden_size": text["hidden_size"], "in_chans": 3, "spatial_patch_size": 14}
    return {"model_type": "qwen2_vl", "vision_config": vision, **text}


@pytest.mark.parametrize("name", QWEN2_VL)
def test_qwen2_vl_has_the_weights_of_transformers_model(name):
    raw = qwen2_vl(name)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**raw))
    expected = {key: tuple(value.shape) for key, value in model.named_parameters()}
    rules = stored_rules(shape_from_dict(raw))
    ours = {hf: size for rule in rules.values() for hf, size in zip(rule.hf_names, rule.hf_shapes, strict=True)}
    assert ours == expected


@pytest.mark.parametrize("model", [*PARAMETERS, *QWEN2_VL])
def test_the_table_has_the_shapes_of_the_model_itself(model):
    """The table is written without building a model; here one is built, on the meta device."""
    install_mcore_shims(get_platform("cpu"))
    from megatron_rb.layout.mesh import RankGrid
    from megatron_rb.models.build import ModelOptions, build_stages, named_parameters
    from megatron_rb.parallel.groups import build_mesh, destroy_groups
    from megatron_rb.parallel.session import Session
    from megatron_rb.parallel.sharding import shard_of, stored_shape
    from megatron_rb.shapes.balance import default_layout

    shape = shape_from_dict(CONFIGS[model] if model in CONFIGS else qwen2_vl(model))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        lone = build_mesh(RankGrid(), 1, timeout_minutes=1, seed=0)
        session = Session(get_platform("cpu"), lone, shape, default_layout(shape, 1), torch.device("meta"))
        stages = build_stages(session, ModelOptions())
        specs = {name: shard_of(parameter) for name, parameter in named_parameters(stages)}
    finally:
        destroy_groups()
        torch.distributed.destroy_process_group()
    rules = stored_rules(shape)
    assert {name: spec.full_shape for name, spec in specs.items()} == {name: r.shape for name, r in rules.items()}
    assert {name: stored_shape(spec) for name, spec in specs.items()} == {n: r.stored_shape for n, r in rules.items()}
