"""Which linears adapters change."""

import pytest

from megatron_rb.config.schema import AdapterConfig
from megatron_rb.models.adapters.plan import adapted, adapters_of
from megatron_rb.shapes.linears import linears
from tests.unit.planner.cases import tiny


def test_a_fused_linear_tells_which_of_its_modules_are_meant():
    (adapter,) = adapters_of({"lora": AdapterConfig(patterns=["q_proj", "v_proj"])}, tiny())
    by_name = {linear.name: adapted(adapter, linear) for linear in linears(tiny())}
    assert by_name["language.layers.0.attention.linear_qkv"] == [0, 2]
    assert by_name["language.layers.0.mlp.linear_fc1"] == [] == by_name["vision.layers.0.attention.linear_qkv"]


@pytest.mark.parametrize(("rslora", "scale"), [(False, 2.0), (True, 4.0)])
def test_the_product_is_scaled_as_peft_does(rslora, scale):
    (adapter,) = adapters_of({"lora": AdapterConfig(rank=4, alpha=8.0, rslora=rslora)}, tiny())
    assert adapter.scale == scale


@pytest.mark.parametrize(
    ("pattern", "sentence"),
    [
        ("q_porj", "model.adapters.lora.patterns: 'q_porj' is no linear of this model; did you mean q_proj"),
        ("lm_head", r"lm_head takes no low-rank factors; train it in full with model.train_in_full=\[lm_head\]"),
        ("embed_tokens", "takes no low-rank factors"),
        ("layers", "is no linear of this model"),
    ],
)
def test_a_pattern_without_a_linear_is_refused(pattern, sentence):
    with pytest.raises(ValueError, match=sentence):
        adapters_of({"lora": AdapterConfig(patterns=["k_proj", pattern])}, tiny())
