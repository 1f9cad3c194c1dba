"""GroupStepAdamW against torch.optim.AdamW."""

import copy

import pytest
import torch

from megatron_rb.platform.group_step_adamw import GroupStepAdamW


def _parameters():
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((4, 3), (5,), (2, 2, 2))]


def _groups(params):
    return [{"params": params[:1], "weight_decay": 0.1}, {"params": params[1:], "weight_decay": 0.0, "lr": 3e-3}]


def _train(optimizer, params, steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()


def test_updates_equal_torch_adamw():
    ours, theirs = _parameters(), _parameters()
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.05}
    _train(GroupStepAdamW(_groups(ours), **settings), ours, 20)
    _train(torch.optim.AdamW(_groups(theirs), **settings), theirs, 20)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_step_lives_in_the_group_and_counts_without_gradients():
    params = _parameters()
    optimizer = GroupStepAdamW([{"params": params}, {"params": []}])
    _train(optimizer, params, 3)
    assert [group["step"] for group in optimizer.param_groups] == [3, 3]
    assert set(optimizer.state[params[0]]) == {"exp_avg", "exp_avg_sq"}


def test_state_dict_resumes_bit_exactly():
    straight, resumed = _parameters(), _parameters()
    optimizer = GroupStepAdamW(_groups(straight), lr=1e-2)
    _train(optimizer, straight, 3)
    first = GroupStepAdamW(_groups(resumed), lr=1e-2)
    _train(first, resumed, 3)
    state = copy.deepcopy(first.state_dict())
    second = GroupStepAdamW(_groups(resumed), lr=1e-2)
    second.load_state_dict(state)
    _train(optimizer, straight, 2, seed=9)
    _train(second, resumed, 2, seed=9)
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))


@pytest.mark.parametrize("words", [{}, {"capturable": False}], ids=["0.16", "from 0.17 on"])
def test_it_is_made_as_every_release_of_megatron_core_makes_its_adam(words):
    options = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "adam_w_mode": True}
    made = GroupStepAdamW(_groups(_parameters()), **options, **words)
    assert [group["lr"] for group in made.param_groups] == [1e-2, 3e-3]


def test_a_step_inside_of_a_cuda_graph_is_refused():
    with pytest.raises(ValueError, match="a step in a CUDA graph needs a fused Adam"):
        GroupStepAdamW(_parameters(), capturable=True)


def test_plain_adam_is_refused():
    with pytest.raises(ValueError, match="plain Adam"):
        GroupStepAdamW(_parameters(), adam_w_mode=False)
