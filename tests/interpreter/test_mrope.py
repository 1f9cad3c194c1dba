"""The Triton rotary kernels against the definition in fp64."""

import pytest
import torch

from megatron_rb.kernels.mrope import reference
from megatron_rb.kernels.mrope.op import apply_mrope, qk_norm_mrope

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
HEADS = {128: (7, 1), 80: (3, 3), 72: (2, 2), 64: (5, 1)}
"""Query heads and key heads that are tried with each head size; not powers of two where it matters."""


def inputs(head_dim: int, dtype: torch.dtype, tokens: int = 6):
    draw = torch.Generator().manual_seed(head_dim)
    heads, groups = HEADS[head_dim]
    packed = torch.randn(tokens, heads + 2 * groups, head_dim, generator=draw).to(dtype).requires_grad_()
    angles = torch.rand(tokens, head_dim // 2, generator=draw) * 100
    grads = [torch.randn(tokens, count, head_dim, generator=draw).to(dtype) for count in (heads, groups)]
    weights = [(1 + 0.3 * torch.randn(head_dim, generator=draw)).to(dtype).requires_grad_() for _ in "qk"]
    return packed, (heads, groups), angles.cos(), angles.sin(), grads, weights


def split(packed, sizes):
    """q and k as the model has them: slices of the packed projection."""
    heads, groups = sizes
    return packed[:, :heads], packed[:, heads : heads + groups]


def close(ours, truth, dtype):
    """Rounded values differ by a rounding of the largest number that went into them."""
    assert ours.dtype == dtype
    scale = max(1.0, truth.abs().max().item())
    torch.testing.assert_close(ours.double(), truth.double(), rtol=0, atol=TOLERANCE[dtype] * scale)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("head_dim", list(HEADS))
def test_rotation_and_its_gradient_equal_fp64(head_dim, dtype):
    packed, sizes, cos, sin, grads, _ = inputs(head_dim, dtype)
    ours = apply_mrope(*split(packed, sizes), cos, sin, implementation="triton")
    (gradient,) = torch.autograd.grad(ours, packed, grads)
    wide = packed.detach().double().requires_grad_()
    truth = [reference.apply_rope(x, cos.double(), sin.double()) for x in split(wide, sizes)]
    (true_gradient,) = torch.autograd.grad(truth, wide, [grad.double() for grad in grads])
    for mine, theirs in zip((*ours, gradient), (*truth, true_gradient), strict=True):
        close(mine, theirs, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_like_hf_equals_the_rounded_reference_bit_for_bit(dtype):
    packed, sizes, cos, sin, grads, _ = inputs(128, dtype)
    results = []
    for implementation in ("triton", "torch"):
        out = apply_mrope(*split(packed, sizes), cos, sin, compute="like_hf", implementation=implementation)
        results.append((*out, *torch.autograd.grad(out, packed, grads)))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("head_dim", [128, 72])
def test_norm_and_rotation_equal_fp64(head_dim, dtype):
    packed, sizes, cos, sin, grads, weights = inputs(head_dim, dtype)
    ours = qk_norm_mrope(*split(packed, sizes), *weights, cos, sin, 1e-6, implementation="triton")
    gradients = torch.autograd.grad(ours, [packed, *weights], grads)
    wide = [x.detach().double().requires_grad_() for x in (packed, *weights)]
    truth = [
        reference.qk_norm_rope(x, w, cos.double(), sin.double(), 1e-6)
        for x, w in zip(split(wide[0], sizes), wide[1:], strict=True)
    ]
    true_gradients = torch.autograd.grad(truth, wide, [grad.double() for grad in grads])
    for mine, theirs in zip((*ours, *gradients), (*truth, *true_gradients), strict=True):
        close(mine, theirs, dtype)


def test_programs_that_take_several_tokens_sum_their_weight_gradients(monkeypatch):
    from megatron_rb.kernels.mrope import triton_impl  # only where triton is installed

    packed, sizes, cos, sin, grads, weights = inputs(64, torch.float32, tokens=7)
    results = []
    for programs in (512, 3):
        monkeypatch.setattr(triton_impl, "PROGRAMS", programs)
        out = qk_norm_mrope(*split(packed, sizes), *weights, cos, sin, 1e-6, implementation="triton")
        results.append(torch.autograd.grad(out, [packed, *weights], grads))
    for one_each, several in zip(*results, strict=True):
        torch.testing.assert_close(several, one_each)


def test_gradients_are_the_same_bits_every_time():
    packed, sizes, cos, sin, grads, weights = inputs(128, torch.bfloat16, tokens=9)
    runs = []
    for _ in range(2):
        out = qk_norm_mrope(*split(packed, sizes), *weights, cos, sin, 1e-6, implementation="triton")
        runs.append(torch.autograd.grad(out, [packed, *weights], grads))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_no_tokens():
    empty = torch.empty(0, 2, 64, requires_grad=True)
    q, k = apply_mrope(empty, empty, torch.empty(0, 32), torch.empty(0, 32), implementation="triton")
    assert q.shape == k.shape == (0, 2, 64)


def test_compiles_without_a_graph_break():
    packed, sizes, cos, sin, _, _ = inputs(64, torch.float32)

    def rotated(x):
        return apply_mrope(*split(x, sizes), cos, sin, implementation="triton")

    compiled = torch.compile(rotated, backend="aot_eager", fullgraph=True)
    for ours, eager in zip(compiled(packed), rotated(packed), strict=True):
        assert torch.equal(ours, eager)
    ours, eager = (torch.autograd.grad(f(packed)[0].square().sum(), packed)[0] for f in (compiled, rotated))
    torch.testing.assert_close(ours, eager)
