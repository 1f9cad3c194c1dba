"""The layers that blocks are built of."""

import pytest
import torch
import torch.nn.functional as F
from transformers.activations import ACT2FN

from megatron_rb.kernels.varlen_attention.segments import Segments
from megatron_rb.layout.mesh import RankGrid
from megatron_rb.models.build import ModelOptions, core_config
from megatron_rb.models.layers import MLP, BuildContext, LocalLayers, activation, column_linear, row_linear
from megatron_rb.parallel.mesh import Mesh
from megatron_rb.parallel.sharding import ShardSpec, shard_of
from tests.unit.planner.cases import tiny


@pytest.fixture(scope="module")
def ctx(lone_mesh):
    return BuildContext(core_config(tiny(), lone_mesh, ModelOptions()), LocalLayers(), lone_mesh)


def filled(module: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return module


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_pytorch_tanh", "quick_gelu", "relu"])
def test_an_activation_is_that_of_transformers_by_its_name(name):
    x = torch.linspace(-6, 6, 101)
    torch.testing.assert_close(activation(name)(x), ACT2FN[name](x))


def test_an_activation_that_is_not_known_is_refused():
    with pytest.raises(ValueError, match="hidden_act 'mish' is not supported; known are silu, gelu, "):
        activation("mish")


def test_norms_are_those_of_torch(ctx):
    x = torch.randn(5, 1, 8)
    rms, layer = (filled(ctx.layers.norm(ctx, kind, 8, 1e-5)) for kind in ("rmsnorm", "layernorm"))
    torch.testing.assert_close(rms(x), F.rms_norm(x, (8,), rms.weight, 1e-5))
    torch.testing.assert_close(layer(x), F.layer_norm(x, (8,), layer.weight, layer.bias, 1e-5))


@pytest.mark.parametrize("build", [column_linear, row_linear])
def test_on_one_rank_a_linear_is_that_of_torch_forwards_and_backwards(ctx, build):
    linear = filled(build(ctx, 6, 4, bias=True))
    found, expected = (torch.randn(3, 1, 6, requires_grad=True) for _ in range(2))
    expected.data.copy_(found.data)
    one, other = linear(found)[0], F.linear(expected, linear.weight, linear.bias)
    torch.testing.assert_close(one, other)
    one.square().sum().backward()
    own = linear.weight.grad.clone()
    linear.weight.grad = None
    other.square().sum().backward()
    torch.testing.assert_close(found.grad, expected.grad)
    torch.testing.assert_close(own, linear.weight.grad)


@pytest.mark.parametrize("act", ["silu", "quick_gelu"])
@pytest.mark.parametrize("gated", [True, False])
def test_an_mlp_is_its_formula(ctx, gated, act):
    mlp = filled(MLP(ctx, 6, 10, gated=gated, bias=True, act=act))
    x = torch.randn(3, 1, 6)
    hidden = F.linear(x, mlp.linear_fc1.weight, mlp.linear_fc1.bias)
    if gated:
        hidden = ACT2FN[act](hidden[..., :10]) * hidden[..., 10:]
    else:
        hidden = ACT2FN[act](hidden)
    torch.testing.assert_close(mlp(x), F.linear(hidden, mlp.linear_fc2.weight, mlp.linear_fc2.bias))


@pytest.mark.parametrize("causal", [True, False])
def test_attention_keeps_to_its_segments(ctx, causal):
    q, k, v = (torch.randn(9, heads, 4) for heads in (4, 2, 2))
    found = ctx.layers.attention(ctx, 4, 2, 4, causal=causal)(q, k, v, Segments.of_lengths([4, 5]))
    pieces = []
    for rows in (slice(0, 4), slice(4, 9)):
        one = [x[rows].transpose(0, 1).unsqueeze(0) for x in (q, k, v)]
        attended = F.scaled_dot_product_attention(*one, is_causal=causal, enable_gqa=True)
        pieces.append(attended[0].transpose(0, 1).flatten(1))
    torch.testing.assert_close(found, torch.cat(pieces))


def test_parameters_know_their_place_by_their_full_size(ctx):
    mlp = MLP(ctx, 6, 10, gated=True, bias=True, act="silu")
    assert {name: shard_of(parameter) for name, parameter in mlp.named_parameters()} == {
        "linear_fc1.weight": ShardSpec((20, 6), dim=0, stride=2),
        "linear_fc1.bias": ShardSpec((20,), dim=0, stride=2),
        "linear_fc2.weight": ShardSpec((6, 10), dim=1),
        "linear_fc2.bias": ShardSpec((6,)),
    }


def test_the_gradient_norm_counts_what_is_cut_and_not_what_every_rank_has(ctx):
    mlp = MLP(ctx, 6, 10, gated=True, bias=True, act="silu")
    cut = {name for name, parameter in mlp.named_parameters() if getattr(parameter, "tensor_model_parallel", False)}
    assert cut == {"linear_fc1.weight", "linear_fc1.bias", "linear_fc2.weight"}


def test_gradients_of_norms_are_summed_over_ranks_that_share_the_rows():
    mesh = Mesh(RankGrid(tp_size=2))
    both = []
    for sequence_parallel in (True, False):
        config = core_config(tiny(), mesh, ModelOptions(sequence_parallel=sequence_parallel))
        ctx = BuildContext(config, LocalLayers(), mesh)
        both.append(ctx.layers.norm(ctx, "rmsnorm", 4, 1e-5).weight.sequence_parallel)
        assert not ctx.without_sequence_parallel().sequence_parallel and ctx.sequence_parallel == sequence_parallel
    assert both == [True, False]
