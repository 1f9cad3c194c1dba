"""RMSNorm and SwiGLU on the torch path, against transformers' own."""

import pytest
import torch
import torch.nn.functional as F
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRMSNorm, Qwen2MLP

from megatron_rb.kernels.rms_norm import reference as norm_reference
from megatron_rb.kernels.rms_norm.op import rms_norm
from megatron_rb.kernels.swiglu import reference as swiglu_reference
from megatron_rb.kernels.swiglu.op import swiglu

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}
EPS = 1e-6


def drawn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(ours, truth, dtype):
    atol = TOLERANCE[dtype] * max(1.0, truth.abs().max().item())
    torch.testing.assert_close(ours.double(), truth.double(), rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_norm_and_its_gradients_equal_fp64(dtype):
    x, weight = drawn(7, 1, 24, dtype=dtype).requires_grad_(), drawn(24, dtype=dtype, seed=1).requires_grad_()
    grad = drawn(7, 1, 24, dtype=dtype, seed=2)
    ours = rms_norm(x, weight, EPS)
    assert ours.dtype == dtype
    wide = [part.detach().double().requires_grad_() for part in (x, weight)]
    truth = norm_reference.rms_norm(*wide, EPS)
    results = (ours, *torch.autograd.grad(ours, (x, weight), grad))
    for mine, its in zip(results, (truth, *torch.autograd.grad(truth, wide, grad.double())), strict=True):
        close(mine, its, dtype)


def test_norm_equals_transformers_bit_for_bit_in_bf16():
    theirs = Qwen2_5_VLRMSNorm(24, EPS).to(torch.bfloat16)
    theirs.weight.data.copy_(drawn(24, seed=1))
    x = drawn(7, 24, dtype=torch.bfloat16)
    assert torch.equal(rms_norm(x, theirs.weight, EPS), theirs(x))
    assert torch.equal(norm_reference.rms_norm(x, theirs.weight, EPS), theirs(x))


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_gate_and_its_gradient_equal_fp64(dtype):
    x, grad = drawn(7, 1, 24, dtype=dtype).requires_grad_(), drawn(7, 1, 12, dtype=dtype, seed=1)
    ours, wide = swiglu(x), x.detach().double().requires_grad_()
    gate, up = wide.chunk(2, -1)
    truth = gate / (1 + torch.exp(-gate)) * up
    torch.testing.assert_close(swiglu_reference.swiglu(wide), truth)
    assert ours.dtype == dtype
    close(ours, truth, dtype)
    close(torch.autograd.grad(ours, x, grad)[0], torch.autograd.grad(truth, wide, grad.double())[0], dtype)


def test_gate_is_the_one_of_transformers():
    config = Qwen2_5_VLTextConfig(hidden_size=8, intermediate_size=12, hidden_act="silu")
    mlp, x = Qwen2MLP(config), drawn(5, 8)
    packed = F.linear(x, torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight)))
    torch.testing.assert_close(mlp.down_proj(swiglu(packed)), mlp(x))


def test_gate_keeps_only_its_input_for_the_backward_pass():
    kept = []
    x = drawn(6, 24).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: kept.append(saved) or saved, lambda saved: saved):
        swiglu(x)
    assert [saved.shape for saved in kept] == [x.shape] and kept[0].data_ptr() == x.data_ptr()


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: rms_norm(torch.zeros(3, 8), torch.zeros(4), EPS), r"weight has shape \(4,\); x of \(3, 8\)"),
        (
            lambda: rms_norm(torch.zeros(3, 8), torch.zeros(8).half(), EPS),
            "weight is torch.float16 and x torch.float32",
        ),
        (lambda: rms_norm(torch.zeros(3, 8), torch.zeros(8), EPS, "liger"), "rms_norm=liger was asked for, but"),
        (lambda: swiglu(torch.zeros(3, 8).int()), "x is torch.int32; it must be one of float16"),
        (lambda: swiglu(torch.zeros(3, 7)), r"x has shape \(3, 7\); .* must be even"),
        (lambda: swiglu(torch.zeros(3, 8), "triton"), "swiglu has no implementation 'triton'; use auto, liger, torch"),
    ],
)
def test_wrong_arguments_are_named(run, message):
    with pytest.raises(ValueError, match=message):
        run()
