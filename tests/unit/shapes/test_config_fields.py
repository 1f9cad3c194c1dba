"""A config.json with a field that cannot be meant, or that asks for what is not computed, is refused in a sentence."""

import json
import re
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from megatron_rb.models.layers import activation
from megatron_rb.shapes.families import ACTIVATIONS, FAMILIES, TEXT_FIXED
from megatron_rb.shapes.shape import load_shape, shape_from_dict
from tests.parity.tiny_models import MODELS

TINY = {family: make_config(0) for family, (make_config, _) in MODELS.items()}


def tiny(family: str, section: str = "", **changed: Any) -> dict[str, Any]:
    """The small model's config.json with other fields in one of its sections."""
    raw = json.loads(json.dumps(TINY[family].to_dict()))
    (raw[section] if section else raw).update(changed)
    return raw


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("text_config", "hidden_act", "relu"),
        ("text_config", "hidden_act", "gelu"),
        ("text_config", "attention_dropout", 0.1),
        ("text_config", "layer_types", ["full_attention", "sliding_attention"]),
        ("text_config", "partial_rotary_factor", 0.5),
        ("vision_config", "num_hidden_layers", 1),
        ("vision_config", "num_attention_heads", 1),
    ],
)
@pytest.mark.parametrize("family", TINY)
def test_what_the_layers_do_not_compute_is_refused(family, section, field, value):
    with pytest.raises(ValueError, match=re.escape(f"here: {section}.{field} is {value!r}, which is not supported")):
        shape_from_dict(tiny(family, section, **{field: value}), "here")


@pytest.mark.parametrize("family", TINY)
def test_rope_that_rotates_in_another_order_is_refused(family):
    raw = tiny(family)
    raw["text_config"]["rope_parameters"]["mrope_interleaved"] = not shape_from_dict(raw).text.mrope_interleaved
    with pytest.raises(ValueError, match="text_config.rope_parameters.mrope_interleaved is .* not supported"):
        shape_from_dict(raw)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_projections_without_bias_are_refused_where_they_always_have_one(family):
    with pytest.raises(ValueError, match="text_config.attention_bias is False, which is not supported"):
        shape_from_dict(tiny(family, "text_config", attention_bias=False))


@pytest.mark.parametrize("family", TINY)
def test_what_the_layers_compute_may_be_said(family):
    usual = {"hidden_act": "silu", "attention_dropout": 0.0, "layer_types": ["full_attention"] * 2}
    assert shape_from_dict(tiny(family, "text_config", **usual)) == shape_from_dict(tiny(family))


@pytest.mark.parametrize("family", TINY)
def test_every_field_that_a_config_class_of_transformers_has_is_known(family):
    """A field of a later release that changes what is computed must be read or refused, or named here as neither."""
    without_effect = {"use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "dtype", "rope_parameters"}
    record, config = FAMILIES[family], AutoConfig.for_model(family)
    for section, known in (
        (config.text_config, {*record.text_defaults, *TEXT_FIXED}),
        (config.vision_config, {*record.vision_defaults, "initializer_range"}),
    ):
        own = {name for name in type(section).__annotations__ if not name.startswith("_") and name.islower()}
        named = {"model_type", "base_config_key", "attribute_map"}
        assert own - known - without_effect - named == set()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_of_a_tower_is_computed(name):
    assert activation(name)(torch.ones(1)).shape == (1,)


def test_activation_of_the_tower_that_is_not_computed_is_refused():
    with pytest.raises(ValueError, match="vision_config.hidden_act 'mish' is not supported; known are silu"):
        shape_from_dict(tiny("qwen3_vl", "vision_config", hidden_act="mish"))


@pytest.mark.parametrize("positions", [63, 65])
def test_learned_positions_that_are_no_square_are_refused(positions):
    with pytest.raises(ValueError, match=f"num_position_embeddings {positions} is no square grid; .*64"):
        shape_from_dict(tiny("qwen3_vl", "vision_config", num_position_embeddings=positions))


@pytest.mark.parametrize(
    ("section", "field", "value", "kind"),
    [
        ("text_config", "num_hidden_layers", 2.5, "a whole number above 0, got 2.5"),
        ("text_config", "num_hidden_layers", "3", "a whole number above 0, got '3'"),
        ("text_config", "hidden_size", "128", "a whole number above 0, got '128'"),
        ("text_config", "hidden_size", True, "a whole number above 0, got True"),
        ("text_config", "intermediate_size", float("inf"), "a whole number above 0, got inf"),
        ("text_config", "rms_norm_eps", "x", "a number above 0, got 'x'"),
        ("text_config", "rms_norm_eps", float("inf"), "a number above 0, got inf"),
        ("text_config", "rms_norm_eps", float("nan"), "a number above 0, got nan"),
        ("text_config", "head_dim", 0, "a whole number above 0, got 0"),
        ("text_config", "initializer_range", -1, "a number of at least 0, got -1"),
        ("vision_config", "depth", "2", "a whole number above 0, got '2'"),
        ("vision_config", "patch_size", [16, 16], r"a whole number above 0, got \[16, 16\]"),
        ("vision_config", "deepstack_visual_indexes", 3, "a list of whole numbers, got 3"),
        ("vision_config", "hidden_act", 3, "a text, got 3"),
        ("", "image_token_id", "5", "a whole number of at least 0, got '5'"),
        ("", "tie_word_embeddings", "maybe", "true or false, got 'maybe'"),
    ],
)
def test_field_of_a_wrong_type_is_named_with_its_value(section, field, value, kind):
    place = f"{section}.{field}" if section else field
    with pytest.raises(ValueError, match=f"^here: {place} must be {kind}"):
        shape_from_dict(tiny("qwen3_vl", section, **{field: value}), "here")


@pytest.mark.parametrize("part", ["rope_theta", "mrope_section"])
def test_part_of_the_rope_of_a_wrong_type_is_named(part):
    raw = tiny("qwen3_vl")
    raw["text_config"]["rope_parameters"][part] = "much"
    with pytest.raises(ValueError, match=f"rope_parameters.{part} must be a .*number.*, got 'much'"):
        shape_from_dict(raw)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[]", r"config.json must hold fields in braces, got \[\]"),
        ("null", "config.json must hold fields in braces, got None"),
        ('{"model_type": []}', r"config.json has model_type \[\]; known are"),
        ('{"model_type": "qwen3_vl", "vision_config": 3}', "config.json: vision_config must hold fields in braces"),
        ('{"model_type": "qwen3_vl", "text_config": 3}', "config.json: text_config must hold fields in braces"),
        ('{"model_type": "qwen2_vl", "rope_scaling": 3}', "config.json: rope_scaling must hold fields in braces"),
    ],
)
def test_file_of_another_form_is_refused_in_a_sentence(tmp_path, text, sentence):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=sentence):
        load_shape(tmp_path)
