"""What each optimizer is built of, and that it is what the settings say."""

import numpy as np
import pytest
import torch

from megatron_rb.config.optimizers import OPTIMIZERS as TRAITS
from megatron_rb.config.schema import OptimizerConfig
from megatron_rb.platform import get_platform
from megatron_rb.platform.mcore_shims import install_mcore_shims

install_mcore_shims(get_platform("cpu"))

from megatron.core.optimizer import OptimizerConfig as McoreOptimizerConfig  # noqa: E402

from megatron_rb.train.optimizers import OPTIMIZERS  # noqa: E402


def test_settings_and_implementations_have_the_same_names():
    assert {name: traits.distributed for name, traits in TRAITS.items()} == {
        name: implementation.distributed for name, implementation in OPTIMIZERS.items()
    }


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_setting_of_an_optimizer_reaches_who_builds_it(name):
    settings = OptimizerConfig(name=name, beta1=0.11, beta2=0.22, eps=0.33, momentum=0.44)
    given = vars(McoreOptimizerConfig(lr=1.0, **OPTIMIZERS[name].settings(settings)))
    groups = [part for value in OPTIMIZERS[name].group(settings).values() for part in np.ravel(value).tolist()]
    for field in TRAITS[name].settings:
        assert getattr(settings, field) in groups, field
        assert getattr(settings, field) in given.values() or OPTIMIZERS[name].build is not None, field


def test_momentum_of_zeros_gives_the_first_step_of_torch():
    gradient, start = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 4.0])
    results = []
    for prepared in (False, True):
        parameter = torch.nn.Parameter(start.clone())
        optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
        if prepared:
            OPTIMIZERS["sgd"].init_state(optimizer)
        for _ in range(3):
            parameter.grad = gradient.clone()
            optimizer.step()
        results.append(parameter.detach())
    assert torch.equal(*results)
