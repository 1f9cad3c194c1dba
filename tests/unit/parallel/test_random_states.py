"""A part of the model that runs twice draws the same numbers both times."""

import pytest
import torch
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel import random as states
from torch.utils.checkpoint import checkpoint

from megatron_rb.parallel.random_states import replayed


@pytest.fixture(autouse=True)
def seeded(lone_mesh):
    tensor_parallel.model_parallel_cuda_manual_seed(3, force_reset_rng=True)


def draw() -> list[float]:
    """A number of the plain generator and one of megatron-core's tracker."""
    with states.get_cuda_rng_tracker().fork():
        tracked = float(torch.rand(()))
    return [float(torch.rand(())), tracked]


def test_the_second_pass_draws_what_the_first_drew():
    first, second = replayed()
    with first:
        expected = draw()
    draw()
    with second:
        assert draw() == expected


def test_what_is_drawn_behind_the_second_pass_does_not_depend_on_it():
    found = []
    for again in (True, False):
        torch.manual_seed(5)
        tensor_parallel.model_parallel_cuda_manual_seed(3, force_reset_rng=True)
        first, second = replayed()
        with first:
            draw()
        if again:
            with second:
                draw()
        found.append(draw())
    assert found[0] == found[1]


def test_recomputed_dropout_gives_the_gradient_of_the_first_mask():
    masks = []

    def layer(x: torch.Tensor) -> torch.Tensor:
        mask = (torch.rand(64) > 0.5).float()
        masks.append(mask)
        return x * mask

    x = torch.ones(64, requires_grad=True)
    out = checkpoint(layer, x, use_reentrant=False, preserve_rng_state=False, context_fn=replayed)
    torch.rand(7)
    (out**2).sum().backward()
    assert len(masks) == 2 and torch.equal(*masks) and torch.equal(x.grad, 2 * masks[0])
