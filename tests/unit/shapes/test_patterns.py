"""Patterns against what peft matches."""

import pytest

from megatron_rb.shapes.patterns import ALL_LINEAR, matching, nearest

NAMES = [
    "model.visual.blocks.0.attn.qkv",
    "model.visual.blocks.0.attn.proj",
    "model.language_model.layers.0.self_attn.q_proj",
    "model.language_model.layers.1.self_attn.q_proj",
    "model.language_model.layers.1.mlp.up_proj",
]


@pytest.mark.parametrize(
    ("pattern", "places"),
    [
        ("q_proj", [2, 3]),
        ("proj", [1]),
        ("self_attn.q_proj", [2, 3]),
        ("layers.1.self_attn.q_proj", [3]),
        ("model.visual.*", [0, 1]),
        ("*.layers.1.*", [3, 4]),
        ("*.[qu]*_proj", [2, 3, 4]),
        (ALL_LINEAR, [0, 1, 2, 3, 4]),
        ("_proj", []),
        ("layers", []),
        (NAMES[4], [4]),
    ],
)
def test_a_pattern_means(pattern, places):
    assert matching(pattern, NAMES) == [NAMES[place] for place in places]


@pytest.mark.parametrize("pattern", ["q_porj", "self_attn.q_poj", "*.q_prj"])
def test_the_nearest_name_comes_first(pattern):
    assert nearest(pattern, NAMES)[0] == "q_proj"


def test_a_word_like_no_other_is_answered_with_some():
    assert nearest("zzz", NAMES)
