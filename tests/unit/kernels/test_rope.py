"""The rope operator against its definition."""

import pytest
import torch

from megatron_rb.kernels.rope import op, reference


def run(apply, x, cos, sin, grad):
    x = x.clone().requires_grad_()
    # As the model calls it: a slice of the fused projection, not contiguous.
    out = apply(x.unbind(2)[1], cos, sin)
    out.backward(grad)
    return out.detach(), x.grad


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
def test_rotation_and_its_gradient_equal_the_definition(dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(17, 3, 3, 16, generator=generator).to(dtype)
    grad = torch.randn(17, 3, 16, generator=generator).to(dtype)
    angles = torch.randn(17, 8, generator=generator) * 5
    results = [run(apply, x, angles.cos(), angles.sin(), grad) for apply in (op.apply_rope, reference.apply_rope)]
    for ours, truth in zip(*results, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, truth, rtol=tolerance, atol=tolerance)


def test_a_quarter_turn_swaps_the_halves():
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    quarter = op.apply_rope(x, torch.zeros(1, 2), torch.ones(1, 2))
    assert quarter.tolist() == [[[-3.0, -4.0, 1.0, 2.0]]]
