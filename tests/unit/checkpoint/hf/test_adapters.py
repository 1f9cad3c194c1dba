"""Folders of peft: what is read, and what is refused in a sentence."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_rb.checkpoint.hf.adapters import WEIGHTS, factor_rules, open_adapter, target_modules
from megatron_rb.config.schema import AdapterConfig
from megatron_rb.models.adapters.plan import adapters_of
from megatron_rb.shapes.foreign import ADAPTER_CONFIG
from megatron_rb.shapes.linears import linears
from megatron_rb.shapes.patterns import matching
from megatron_rb.shapes.shape import load_shape
from tests.parity.peft_models import write_adapter
from tests.parity.tiny_models import MODELS, write_model


@pytest.fixture(scope="module", params=list(MODELS))
def model(request, tmp_path_factory):
    return write_model(tmp_path_factory.mktemp(request.param) / "hf", request.param, seed=0)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    """An adapter of all linears."""
    return write_adapter(model, tmp_path_factory.mktemp("peft") / "saved", 0, r=2, target_modules="all-linear")


@pytest.fixture
def changed(saved, tmp_path):
    """Copies the adapter with other settings."""

    def change(drop: str = "", **settings):
        tree = json.loads((saved / ADAPTER_CONFIG).read_text()) | settings
        (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(tree))
        save_file(
            {name: each for name, each in load_file(saved / WEIGHTS).items() if not drop or drop not in name},
            tmp_path / WEIGHTS,
        )
        return tmp_path

    return change


def test_every_tensor_of_pefts_file_is_a_factor_of_ours(model, saved):
    shape = load_shape(model)
    opened = open_adapter(saved, "lora", shape)
    names = {name for rule in factor_rules(opened.adapter, shape).values() for name in rule.hf_names}
    assert names == set(opened.names) and set(opened.names.values()) == set(load_file(saved / WEIGHTS))
    assert opened.in_full == ()


def test_splitting_undoes_joining(model, saved):
    opened = open_adapter(saved, "lora", load_shape(model))
    for name, rule in factor_rules(opened.adapter, load_shape(model)).items():
        (tensor,) = (opened.read(each) for each in rule.hf_names)
        assert torch.equal(rule.split(rule.join([tensor]))[0], tensor), name


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"peft_type": "IA3"}, "holds an adapter of kind IA3; LoRA and rsLoRA are read here"),
        ({"use_dora": True}, "holds a DoRA adapter"),
        ({"bias": "all"}, "has trained biases"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base too"),
        ({"rank_pattern": {"q_proj": 4}}, "sets rank_pattern"),
        ({"layers_to_transform": [0]}, "sets layers_to_transform"),
        ({"a_field_of_a_later_release": 1}, "sets a_field_of_a_later_release: 1, which is not supported"),
        ({"r": 0}, "r is 0; it is a number above 0"),
        ({"lora_alpha": "x"}, "lora_alpha is 'x'"),
        ({"r": 4}, "has the shape"),
    ],
)
def test_another_kind_is_refused(changed, settings, sentence, model):
    with pytest.raises(ValueError, match=sentence):
        open_adapter(changed(**settings), "lora", load_shape(model))


def test_fields_that_are_empty_are_no_other_kind(changed, model):
    folder = changed(rank_pattern={}, layers_to_transform=None, a_field_of_a_later_release=False)
    assert open_adapter(folder, "lora", load_shape(model)).adapter.rank == 2


def test_a_factor_without_the_other_is_missed(changed, model):
    with pytest.raises(
        ValueError, match="lacks base_model.model.model.language_model.layers.1.mlp.up_proj.lora_B.weight"
    ):
        open_adapter(changed(drop="layers.1.mlp.up_proj.lora_B"), "lora", load_shape(model))


def test_an_adapter_of_a_larger_model_is_refused(saved, model, tmp_path):
    tensors = load_file(saved / WEIGHTS)
    tensors["base_model.model.model.language_model.layers.99.mlp.up_proj.lora_A.weight"] = torch.zeros(2, 2)
    save_file(tensors, tmp_path / WEIGHTS)
    (tmp_path / ADAPTER_CONFIG).write_text((saved / ADAPTER_CONFIG).read_text())
    with pytest.raises(ValueError, match="layers.99.mlp.up_proj, which is no linear of this model"):
        open_adapter(tmp_path, "lora", load_shape(model))


def test_a_folder_without_an_adapter_is_refused(tmp_path, model):
    with pytest.raises(ValueError, match="has no adapter_config.json"):
        open_adapter(tmp_path, "lora", load_shape(model))
    (tmp_path / ADAPTER_CONFIG).write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        open_adapter(tmp_path, "lora", load_shape(model))
    (tmp_path / ADAPTER_CONFIG).write_text('{"peft_type": "LORA"}')
    with pytest.raises(ValueError, match="has no adapter_model.safetensors"):
        open_adapter(tmp_path, "lora", load_shape(model))


@pytest.mark.parametrize(
    "patterns",
    [["all-linear"], ["q_proj", "down_proj"], ["attn.proj"], ["*.layers.1.*"], ["*.blocks.0.attn.*", "o_proj"]],
)
def test_the_words_of_an_adapter_mean_its_modules_and_no_other_module_of_transformers(patterns, model):
    from megatron_rb.checkpoint.hf.oracle import load_transformers

    shape = load_shape(model)
    (adapter,) = adapters_of({"lora": AdapterConfig(patterns=patterns)}, shape)
    words = target_modules(adapter, shape)
    everything = [name for name, _ in load_transformers(model).named_modules()]
    meant = {name for word in words for name in matching(word, everything)}
    assert meant == adapter.modules
    assert len(words) <= len([linear for linear in linears(shape) for _ in linear.modules])
