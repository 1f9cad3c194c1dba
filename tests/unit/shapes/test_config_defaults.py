"""A config.json that omits fields means what transformers reads from it."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from megatron_rb.shapes.families import FAMILIES
from megatron_rb.shapes.published import CONFIGS
from megatron_rb.shapes.shape import load_shape, shape_from_dict
from tests.parity.tiny_models import MODELS

TINY = {family: make_config(0) for family, (make_config, _) in MODELS.items()}
SECTIONS = {"vision_config": "vision_defaults", "text_config": "text_defaults"}
OMISSIONS = [
    (family, section, field)
    for family in TINY
    for section, defaults in SECTIONS.items()
    for field in getattr(FAMILIES[family], defaults)
] + [
    (family, "", field)
    for family in TINY
    for field in ("vision_config", "image_token_id", "video_token_id", "vision_start_token_id", "tie_word_embeddings")
]


def outcome(raw: dict[str, Any]) -> Any:
    """The shape, or why there is none: what is omitted may not fit what is there."""
    try:
        return shape_from_dict(raw)
    except ValueError as error:
        return str(error)


def as_transformers_reads(raw: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The config with every field that transformers fills in."""
    (folder / "config.json").write_text(json.dumps(raw))
    return json.loads(json.dumps(AutoConfig.from_pretrained(folder).to_dict()))


def tiny(family: str) -> dict[str, Any]:
    raw = json.loads(json.dumps(TINY[family].to_dict()))
    raw["text_config"].pop("layer_types", None)  # derived from the number of layers
    return raw


@pytest.mark.parametrize(("family", "section", "field"), OMISSIONS)
def test_omitted_field_has_the_value_of_transformers(tmp_path, family, section, field):
    raw = tiny(family)
    (raw[section] if section else raw).pop(field, None)
    assert outcome(raw) == outcome(as_transformers_reads(raw, tmp_path))


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("field", ["rope_theta", "mrope_section"])
def test_omitted_part_of_the_rope_has_the_value_of_transformers(tmp_path, family, field):
    raw = tiny(family)
    del raw["text_config"]["rope_parameters"][field]
    assert outcome(raw) == outcome(as_transformers_reads(raw, tmp_path))


@pytest.mark.parametrize("family", TINY)
def test_omitted_rope_has_the_values_of_transformers(tmp_path, family):
    raw = tiny(family)
    del raw["text_config"]["rope_parameters"]
    assert outcome(raw) == outcome(as_transformers_reads(raw, tmp_path))


@pytest.mark.parametrize("family", TINY)
def test_older_word_for_the_rope_wins(tmp_path, family):
    raw = tiny(family)
    head_size = outcome(raw).text.head_dim
    section = [head_size // 2 - 4, 2, 2]
    raw["text_config"]["rope_scaling"] = {"rope_type": "default", "rope_theta": 777.0, "mrope_section": section}
    shape = outcome(raw)
    assert shape == outcome(as_transformers_reads(raw, tmp_path))
    assert (shape.text.rope_theta, shape.text.mrope_section) == (777.0, tuple(section))


@pytest.mark.parametrize("family", TINY)
def test_all_sizes_omitted(tmp_path, family):
    raw = {"model_type": family}
    assert outcome(raw) == outcome(as_transformers_reads(raw, tmp_path))


@pytest.mark.parametrize("name", CONFIGS)
def test_published_config_without_its_defaults_is_the_same_model(tmp_path, name):
    raw = copy.deepcopy(CONFIGS[name])
    family = raw["model_type"]
    text = raw.get("text_config", raw)
    record = FAMILIES[family]
    for section, defaults in ((raw["vision_config"], record.vision_defaults), (text, record.text_defaults)):
        for field, value in defaults.items():
            if section.get(field) == value:
                del section[field]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert raw != CONFIGS[name]
    assert load_shape(tmp_path) == shape_from_dict(CONFIGS[name])


@pytest.mark.parametrize("family", TINY)
def test_heads_of_keys_that_are_null_are_as_many_as_those_of_queries(tmp_path, family):
    raw = tiny(family)
    raw["text_config"]["num_key_value_heads"] = None
    assert outcome(raw) == outcome(as_transformers_reads(raw, tmp_path))
    assert outcome(raw).text.num_query_groups == 4


def test_field_without_a_value_is_named():
    raw = tiny("qwen3_vl")
    raw["vision_config"]["depth"] = None
    with pytest.raises(ValueError, match="gives the field 'depth' of a qwen3_vl model no value"):
        shape_from_dict(raw)
