"""A config.json that no layer here computes as transformers does, or that nothing could be trained with, is refused."""

import json
from typing import Any

import pytest

from megatron_rb.shapes.shape import shape_from_dict
from tests.parity.tiny_models import MODELS

TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def tiny(family: str, **changes: Any) -> dict[str, Any]:
    raw = json.loads(json.dumps(MODELS[family][0](0).to_dict()))
    return raw | {name: {**raw[name], **value} if isinstance(value, dict) else value for name, value in changes.items()}


def rope(section: list[int]) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": section}}


@pytest.mark.parametrize("order", [[1, 0], [0, 0]], ids=["falling", "repeated"])
def test_deepstack_layers_that_do_not_rise_are_refused(order: list[int]):
    with pytest.raises(ValueError, match="deepstack_visual_indexes .* must rise, each layer once"):
        shape_from_dict(tiny("qwen3_vl", vision_config={"deepstack_visual_indexes": order}))


@pytest.mark.parametrize("family", MODELS)
def test_a_rope_of_two_sections_is_refused(family: str):
    half = shape_from_dict(tiny(family)).text.head_dim // 2
    with pytest.raises(ValueError, match="mrope_section .* must have 3 numbers: of time, height and width"):
        shape_from_dict(tiny(family, text_config=rope([half - 2, 2])))


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("name", TOKENS)
def test_a_special_token_beyond_the_vocabulary_is_refused(family: str, name: str):
    size = shape_from_dict(tiny(family)).text.vocab_size
    with pytest.raises(ValueError, match=rf"{name} {size}.* must lie in 0\.\.{size - 1} \(vocab_size\)"):
        shape_from_dict(tiny(family, **{name: size}))


def test_pictures_and_videos_must_have_tokens_of_their_own():
    raw = tiny("qwen3_vl")
    with pytest.raises(ValueError, match="image_token_id .*, video_token_id .* must differ from each other"):
        shape_from_dict(raw | {"video_token_id": raw["image_token_id"]})


@pytest.mark.parametrize(
    ("family", "section"), [*((family, "vision_config") for family in MODELS), ("qwen3_vl", "text_config")]
)
def test_a_section_without_a_value_is_named(family: str, section: str):
    with pytest.raises(ValueError, match=f"gives the section '{section}' of a {family} model no value"):
        shape_from_dict(tiny(family, **{section: None}))
