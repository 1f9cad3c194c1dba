"""Optimizers: what the settings say of them is what megatron-core builds."""

import dataclasses

import pytest

from megatron_rb.config.optimizers import OPTIMIZERS, check_optimizer
from megatron_rb.config.rules import CHOICES
from megatron_rb.config.schema import Config, OptimizerConfig
from megatron_rb.planner.memory import state_bytes


def asked(name: str, distributed: bool = False, **settings: float) -> Config:
    config = Config()
    config.optimizer = OptimizerConfig(name=name, **settings)
    config.parallel.distributed_optimizer = distributed
    return config


def test_every_optimizer_can_be_chosen():
    assert sorted(CHOICES["optimizer.name"]) == sorted(OPTIMIZERS)


def test_settings_of_optimizers_are_settings():
    fields = {field.name for field in dataclasses.fields(OptimizerConfig)}
    assert {name for traits in OPTIMIZERS.values() for name in traits.settings} <= fields


def test_a_setting_that_the_optimizer_does_not_read_is_refused():
    with pytest.raises(ValueError, match="optimizer.beta1 is 0.8 and optimizer.name sgd, which does not read it"):
        check_optimizer(asked("sgd", beta1=0.8))
    with pytest.raises(ValueError, match="optimizer.momentum is 0.5 and optimizer.name adamw.*optimizer.name=sgd"):
        check_optimizer(asked("adamw", momentum=0.5))
    check_optimizer(asked("sgd", momentum=0.5))


def test_state_that_cannot_be_shared_out_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match="cannot share the state of optimizer.name sgd.*distributed_optimizer=false"):
        check_optimizer(asked("sgd", distributed=True))
    check_optimizer(asked("adamw", distributed=True))


def test_bytes_of_state_are_those_of_the_optimizer():
    adamw, sgd = OPTIMIZERS["adamw"], OPTIMIZERS["sgd"]
    assert [state_bytes("bf16", True, 4, adamw).optimizer, state_bytes("fp32", True, 4, adamw).optimizer] == [3.0, 2.0]
    assert [state_bytes("bf16", False, 4, sgd).optimizer, state_bytes("fp32", False, 4, sgd).optimizer] == [8.0, 4.0]
