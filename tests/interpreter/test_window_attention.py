"""The Triton window kernels against the definition in fp64."""

import pytest
import torch

from megatron_rb.kernels.varlen_attention.segments import Segments
from megatron_rb.kernels.window_attention import reference
from megatron_rb.kernels.window_attention.op import window_attention

TOLERANCE = {torch.float32: 3e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
RAGGED = [64, 4, 0, 32, 48, 0]
"""Full, smallest and border windows, and empty ones inside and at the end, as padded grids have them."""


def inputs(head_dim: int, dtype: torch.dtype, lengths, heads: int = 2, head_by_head: bool = False):
    draw = torch.Generator().manual_seed(head_dim)
    patches = sum(lengths)
    qkv = torch.randn(patches, 3, heads, head_dim, generator=draw).to(dtype)
    if head_by_head:
        qkv = qkv.transpose(1, 2).contiguous().transpose(1, 2)
    angles = torch.rand(patches, head_dim // 2, generator=draw) * 50
    grad = torch.randn(patches, heads, head_dim, generator=draw).to(dtype)
    return qkv.requires_grad_(), angles.cos(), angles.sin(), grad


def run(qkv, cos, sin, grad, lengths):
    out = window_attention(qkv, cos, sin, Segments.of_lengths(lengths), "triton")
    return out, *torch.autograd.grad(out, qkv, grad)


def truth(qkv, cos, sin, grad, lengths):
    wide = qkv.detach().double().requires_grad_()
    out = reference.window_attention(wide, cos.double(), sin.double(), Segments.of_lengths(lengths))
    return out, *torch.autograd.grad(out, wide, grad.double())


def close(ours, true, dtype):
    assert ours.dtype == dtype
    atol = TOLERANCE[dtype] * max(1.0, true.abs().max().item())
    torch.testing.assert_close(ours.double(), true.double(), rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("head_dim", [64, 72, 80])
def test_output_and_gradient_equal_fp64(head_dim, dtype):
    batch = inputs(head_dim, dtype, RAGGED, heads=1)
    for ours, true in zip(run(*batch, RAGGED), truth(*batch, RAGGED), strict=True):
        close(ours, true, dtype)


@pytest.mark.parametrize("head_by_head", [False, True])
def test_both_orders_of_the_packed_projection(head_by_head):
    lengths = [12, 20]
    batch = inputs(80, torch.float32, lengths, heads=3, head_by_head=head_by_head)
    (out, gradient), true = run(*batch, lengths), truth(*batch, lengths)
    close(out, true[0], torch.float32)
    close(gradient, true[1], torch.float32)
    assert out.is_contiguous()


@pytest.mark.parametrize("length", [1, 4, 16, 17, 36, 63, 64])
def test_every_length_of_a_window(length):
    lengths = [length]
    batch = inputs(16, torch.float32, lengths, heads=1)
    for ours, true in zip(run(*batch, lengths), truth(*batch, lengths), strict=True):
        close(ours, true, torch.float32)


def test_large_scores_do_not_overflow():
    lengths = [8]
    qkv, cos, sin, grad = inputs(64, torch.float32, lengths, heads=1)
    batch = ((qkv.detach() * 30).requires_grad_(), cos, sin, grad)
    for ours, true in zip(run(*batch, lengths), truth(*batch, lengths), strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours.double(), true, rtol=0, atol=1e-4 * true.abs().max().item())


def test_gradients_are_the_same_bits_every_time():
    batch = inputs(80, torch.bfloat16, [20, 64], heads=1)
    first, second = (run(*batch, [20, 64]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_patches():
    batch = inputs(80, torch.float32, [])
    out, gradient = run(*batch, [])
    assert out.shape == (0, 2, 80) and gradient.shape == (0, 3, 2, 80)


def test_under_recompute():
    lengths = [8, 12]
    qkv, cos, sin, grad = inputs(64, torch.float32, lengths, heads=1)
    windows = Segments.of_lengths(lengths)
    recomputed = torch.utils.checkpoint.checkpoint(
        window_attention, qkv, cos, sin, windows, "triton", use_reentrant=False
    )
    assert torch.equal(torch.autograd.grad(recomputed, qkv, grad)[0], run(qkv, cos, sin, grad, lengths)[1])


def test_compiles_without_a_graph_break():
    lengths = [8, 12]
    qkv, cos, sin, grad = inputs(64, torch.float32, lengths, heads=1)
    windows = Segments.of_lengths(lengths)
    compiled = torch.compile(
        lambda x: window_attention(x, cos, sin, windows, "triton"), backend="aot_eager", fullgraph=True
    )
    out = compiled(qkv)
    eager, gradient = run(qkv, cos, sin, grad, lengths)
    assert torch.equal(out, eager)
    assert torch.equal(torch.autograd.grad(out, qkv, grad)[0], gradient)
