import pytest

from megatron_rb.platform import get_platform
from megatron_rb.platform.mcore_shims import install_mcore_shims

install_mcore_shims(get_platform("cpu"))
from megatron_rb.models.layer_choice import select_layers  # noqa: E402


@pytest.mark.parametrize(
    ("choice", "dtype", "installed"),
    [("auto", "bf16", False), ("auto", "fp32", True), ("local", "bf16", True), ("local", "fp32", False)],
)
def test_local_layers_where_transformer_engine_is_absent_or_cannot_compute(choice, dtype, installed):
    assert select_layers(choice, dtype, installed).name == "local"


def test_transformer_engine_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="Transformer Engine is not installed; install it or use auto"):
        select_layers("transformer_engine", "bf16", has_transformer_engine=False)


def test_transformer_engine_in_fp32_is_refused():
    with pytest.raises(ValueError, match="model.dtype=fp32.*use model.dtype=bf16 or model.layers=local"):
        select_layers("transformer_engine", "fp32", has_transformer_engine=True)


@pytest.mark.parametrize("choice", ["auto", "transformer_engine"])
def test_transformer_engine_where_it_is_there(choice):
    assert select_layers(choice, "bf16", has_transformer_engine=True).name == "transformer_engine"


def test_another_name_is_refused():
    with pytest.raises(ValueError, match="model.layers is 'fast'; use auto, local or transformer_engine"):
        select_layers("fast", "bf16", has_transformer_engine=True)
