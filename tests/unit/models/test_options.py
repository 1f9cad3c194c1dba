"""A model is what its settings say, whoever builds it."""

import pytest
import torch.distributed as dist

from megatron_rb.app.session import adapt_megatron, session_of
from megatron_rb.config.schema import Config, KernelsConfig, ModelConfig, PlatformConfig, RecomputeConfig
from tests.unit.planner.cases import tiny

adapt_megatron("cpu")

from megatron_rb.models.build import ModelOptions, build_stages  # noqa: E402
from megatron_rb.models.stage import Recompute  # noqa: E402


@pytest.fixture(scope="module")
def session():
    with session_of(Config(platform=PlatformConfig("cpu")), tiny()) as session:
        yield session
    dist.destroy_process_group()


def test_the_operators_of_a_model_are_those_of_its_settings(session):
    kernels = KernelsConfig(*["torch"] * len(vars(KernelsConfig())))
    config = Config(model=ModelConfig(dtype="fp32", layers="local"), kernels=kernels)
    [stage] = build_stages(session, ModelOptions.of(config))
    layer, vision = stage.language.layers["0"], stage.vision.layers["0"]
    taken = [layer.attention.rope, layer.attention.core.implementation, layer.input_norm.implementation]
    taken += [layer.mlp.swiglu, stage.rows, stage.language.embedding.rows, vision.attention.rope]
    assert taken == ["torch"] * len(taken)


def test_options_of_a_config_are_all_that_it_says_of_the_model():
    config = Config(model=ModelConfig(dtype="bf16", layers="local", recompute=RecomputeConfig(1, 2, [3], [4])))
    config.parallel.sequence_parallel = True
    assert ModelOptions.of(config) == ModelOptions("bf16", "local", True, Recompute(1, 2, (3,), (4,)), config.kernels)


def test_layers_that_cannot_be_had_are_refused_when_the_model_is_built(session):
    config = Config(model=ModelConfig(dtype="fp32", layers="transformer_engine"))
    with pytest.raises(ValueError, match="model.layers=transformer_engine"):
        build_stages(session, ModelOptions.of(config))
