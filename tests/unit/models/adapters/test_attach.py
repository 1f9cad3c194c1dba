"""Factors beside the linears of a stage: where they are, what they begin with."""

import math

import torch

from megatron_rb.config.schema import AdapterConfig
from megatron_rb.models.adapters.attach import attach_adapters, fresh_factors, is_factor
from megatron_rb.models.adapters.plan import adapters_of
from megatron_rb.models.build import ModelOptions, build_stages, named_parameters
from megatron_rb.parallel.sharding import shard_of


def attached(session, **settings):
    """The stages of one process with an adapter."""
    stages = build_stages(session, ModelOptions())
    attach_adapters(stages, adapters_of({"lora": AdapterConfig(**settings)}, session.shape), session.device)
    return stages


def test_names_of_the_linears_stay_and_factors_lie_below_them(session):
    before = {name for name, _ in named_parameters(build_stages(session, ModelOptions()))}
    after = {name for name, _ in named_parameters(attached(session, patterns=["v_proj"], rank=2))}
    added = {
        f"language.layers.{index}.attention.linear_qkv.adapters.lora.v_proj.lora_{factor}"
        for index in range(session.shape.text.num_layers)
        for factor in "AB"
    }
    assert before < after and after - before == added
    assert all(is_factor(name) for name in added) and not any(map(is_factor, before))


def test_every_factor_knows_its_full_size(session):
    for name, parameter in named_parameters(attached(session, rank=2)):
        if is_factor(name):
            assert shard_of(parameter).full_shape == tuple(parameter.shape), name


def test_first_factors_are_drawn_as_torch_draws_linears_and_second_ones_are_zero():
    shapes = {"a.lora_A": (64, 100), "b.lora_A": (64, 100), "a.lora_B": (50, 64)}
    read, again = fresh_factors(shapes, seed=1), fresh_factors(shapes, seed=1)
    first = read("a.lora_A")
    assert torch.equal(first, again("a.lora_A")) and not torch.equal(first, read("b.lora_A"))
    assert not read("a.lora_B").any()
    torch.manual_seed(0)
    theirs = torch.nn.Linear(100, 64).weight.detach()
    assert first.abs().max() <= 1 / math.sqrt(100) and math.isclose(first.std(), theirs.std(), rel_tol=0.05)
