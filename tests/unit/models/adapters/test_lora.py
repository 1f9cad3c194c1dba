"""The update of one linear on one rank against the product of its factors; many ranks are in tests/parity."""

import pytest
import torch

from megatron_rb.config.schema import AdapterConfig
from megatron_rb.models.adapters.lora import LoraUpdate
from megatron_rb.models.adapters.plan import adapters_of
from megatron_rb.shapes.linears import linears
from tests.unit.planner.cases import tiny

ROWS = 6


def update_of(name: str, dropout: float = 0.0, **settings) -> LoraUpdate:
    """The update of a linear of the tiny model, with drawn factors."""
    shape = tiny()
    (adapter,) = adapters_of({"lora": AdapterConfig(rank=3, alpha=6.0, dropout=dropout, **settings)}, shape)
    linear = next(linear for linear in linears(shape) if linear.name == name)
    update = LoraUpdate(adapter, linear, shape.text.num_query_groups, 1, False, torch.float32)
    generator = torch.Generator().manual_seed(1)
    for parameter in update.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return update


def drawn(update: LoraUpdate) -> torch.Tensor:
    return torch.randn(ROWS, 1, update.linear.inputs, generator=torch.Generator().manual_seed(2))


def test_a_plain_linear_gets_the_scaled_product(session):
    update = update_of("language.layers.0.mlp.linear_fc2")
    x = drawn(update)
    factors = update.down_proj
    assert torch.allclose(update(x), 2.0 * x @ factors.lora_A.T @ factors.lora_B.T, atol=1e-5)


def test_gate_and_up_lie_below_each_other_and_what_has_no_factors_stays(session):
    update = update_of("language.layers.0.mlp.linear_fc1", patterns=["up_proj"])
    x = drawn(update)
    gate, up = update(x).chunk(2, -1)
    assert not gate.any()
    assert torch.allclose(up, 2.0 * x @ update.up_proj.lora_A.T @ update.up_proj.lora_B.T, atol=1e-5)


def test_queries_keys_and_values_go_group_by_group(session):
    text = tiny().text
    update = update_of("language.layers.0.attention.linear_qkv", patterns=["q_proj", "v_proj"])
    x = drawn(update)
    heads = text.num_heads // text.num_query_groups
    out = update(x).view(ROWS, text.num_query_groups, heads + 2, text.head_dim)
    q = 2.0 * x @ update.q_proj.lora_A.T @ update.q_proj.lora_B.T
    v = 2.0 * x @ update.v_proj.lora_A.T @ update.v_proj.lora_B.T
    assert torch.allclose(out[:, :, :heads].reshape(ROWS, -1), q.squeeze(1), atol=1e-5)
    assert not out[:, :, heads].any()
    assert torch.allclose(out[:, :, heads + 1].reshape(ROWS, -1), v.squeeze(1), atol=1e-5)


@pytest.mark.parametrize("name", ["language.layers.0.mlp.linear_fc2", "language.layers.0.mlp.linear_fc1"])
def test_inputs_are_dropped_in_training_alone(name, session):
    update = update_of(name, dropout=0.5)
    x = drawn(update)
    torch.manual_seed(0)
    first, second = update(x), update(x)
    assert not torch.equal(first, second)
    update.eval()
    assert torch.equal(update(x), update_of(name)(x))
