"""A model is what its settings say, whoever builds it, with the same weights on every layout."""

import pytest
import torch
import torch.distributed as dist

from megatron_rb.app.session import adapt_megatron, session_of
from megatron_rb.config.schema import Config, KernelsConfig, ModelConfig, PlatformConfig, RecomputeConfig
from megatron_rb.layout.mesh import RankGrid
from megatron_rb.shapes.balance import default_layout
from megatron_rb.shapes.shape import load_shape, shape_from_dict
from tests.parity.tiny_models import MODELS, write_model
from tests.unit.planner.cases import tiny

adapt_megatron("cpu")

from megatron_rb.models.build import (  # noqa: E402
    ModelOptions,
    build_stages,
    core_config,
    fill_weights,
    full_shapes,
    named_parameters,
    part_of,
    random_weights,
    weight_key,
)
from megatron_rb.models.stage import EMBEDDING_WEIGHT, HEAD_WEIGHT, Recompute  # noqa: E402
from megatron_rb.parallel.mesh import Mesh  # noqa: E402
from megatron_rb.parallel.session import Session  # noqa: E402
from megatron_rb.platform import get_platform  # noqa: E402


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


@pytest.mark.parametrize("vpp_size", [1, 2])
def test_outputs_are_freed_after_a_send_only_where_the_schedule_waits_for_it(vpp_size, tmp_path):
    """A tensor whose data is exchanged while gloo sends it arrives as whatever took its memory."""
    shape = load_shape(write_model(tmp_path / "hf", "qwen3_vl", seed=0))
    mesh = Mesh(RankGrid(pp_size=2), vpp_size=vpp_size)
    config = core_config(shape, mesh, ModelOptions())
    assert config.overlap_p2p_comm == (vpp_size > 1)
    assert not (config.overlap_p2p_comm and config.deallocate_pipeline_outputs)


def test_a_type_that_is_not_known_is_refused():
    with pytest.raises(ValueError, match="model.dtype is 'fp8'; use bf16 or fp32"):
        core_config(tiny(), Mesh(RankGrid()), ModelOptions(dtype="fp8"))


def test_one_rank_has_no_sequence_parallelism_whatever_is_asked():
    asked = ModelOptions(sequence_parallel=True)
    sizes = {1: False, 2: True}
    assert {tp: core_config(tiny(), Mesh(RankGrid(tp_size=tp)), asked).sequence_parallel for tp in sizes} == sizes


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("vision.patch_embed.weight", "vision"),
        ("vision.layers.3.mlp.linear_fc1.weight", "vision"),
        ("vision.merger.norm.weight", "merger"),
        ("vision.deepstack.1.linear_fc1.bias", "merger"),
        ("language.head.output.weight", "language"),
        ("module.module.vision.merger.norm.weight", "merger"),
        ("module.vision.layers.0.norm1.weight", "vision"),
    ],
)
def test_a_parameter_belongs_to_the_part_its_name_begins_with(name, part):
    assert part_of(name) == part


SHAPES = {tied: shape_from_dict(MODELS["qwen3_vl"][0](int(tied)).to_dict()) for tied in (False, True)}


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_of_tied_embeddings_is_stored_as_the_embedding(tied):
    assert weight_key(HEAD_WEIGHT, SHAPES[tied]) == (EMBEDDING_WEIGHT if tied else HEAD_WEIGHT)
    assert weight_key(EMBEDDING_WEIGHT, SHAPES[tied]) == EMBEDDING_WEIGHT


def stages_of(session, shape, layout, rank):
    """The chunks that a rank of two pipeline stages would have."""
    mesh = Mesh(RankGrid(pp_size=layout.pp_size), rank)
    return build_stages(Session(get_platform("cpu"), mesh, shape, layout, torch.device("cpu")), ModelOptions())


@pytest.mark.parametrize("tied", [False, True])
def test_fresh_weights_do_not_depend_on_the_layout(session, tied):
    shape = SHAPES[tied]
    layout = default_layout(shape, 2)
    [whole] = stages_of(session, shape, default_layout(shape, 1), 0)
    fill_weights([whole], Mesh(RankGrid()), random_weights([whole], seed=5))
    expected = dict(whole.named_parameters())
    for rank in range(2):
        stages = stages_of(session, shape, layout, rank)
        fill_weights(stages, Mesh(RankGrid()), random_weights(stages, seed=5))
        for name, parameter in named_parameters(stages):
            assert torch.equal(parameter, expected[name if name in expected else EMBEDDING_WEIGHT]), name


@pytest.mark.parametrize("seeds", [(1, 2), (0, 2**32), (2**63 - 1, 2**31 - 1)])
def test_fresh_weights_change_with_every_bit_of_the_seed_and_differ_between_parameters(session, seeds):
    shape = SHAPES[False]
    stages = stages_of(session, shape, default_layout(shape, 1), 0)
    first, second = (random_weights(stages, seed) for seed in seeds)
    name, other = (f"vision.layers.{number}.attention.linear_proj.weight" for number in (0, 1))
    assert torch.equal(first(name), random_weights(stages, seeds[0])(name))
    assert not torch.equal(first(name), second(name)) and not torch.equal(first(name), first(other))
    assert abs(float(first(name).std()) - shape.initializer_range) < 0.1 * shape.initializer_range
    assert first("vision.layers.0.norm1.weight").eq(1).all() and not first("vision.layers.0.norm1.bias").any()


def test_every_parameter_is_what_was_read_under_its_name(session):
    shape = SHAPES[True]
    stages = stages_of(session, shape, default_layout(shape, 1), 0)
    sizes, asked = full_shapes(stages), {}

    def read(name):
        asked[name] = torch.randn(sizes[name])
        return asked[name]

    fill_weights(stages, Mesh(RankGrid()), read)
    assert asked.keys() == sizes.keys() and HEAD_WEIGHT not in asked
    assert all(torch.equal(parameter, asked[name]) for name, parameter in named_parameters(stages))
