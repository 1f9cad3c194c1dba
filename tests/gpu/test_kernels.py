"""The Triton kernels on a real device: values against fp64, and no wait of the host for the device."""

import numpy as np
import pytest
import torch

from megatron_rb.kernels.dynamic_padding.op import add_rows, gather_rows, merge_rows
from megatron_rb.kernels.dynamic_padding.row_map import RowMap
from megatron_rb.kernels.mrope import reference as mrope_reference
from megatron_rb.kernels.mrope.op import apply_mrope
from megatron_rb.kernels.varlen_attention.segments import Segments
from megatron_rb.kernels.window_attention import reference as window_reference
from megatron_rb.kernels.window_attention.op import window_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
DEVICE = torch.device("cuda")
TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3e-2}


def drawn(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, dtype=dtype, device=DEVICE).requires_grad_()


def angles(rows: int, half: int):
    drawn_angles = torch.rand(rows, half, device=DEVICE) * 50
    return drawn_angles.cos(), drawn_angles.sin()


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("head_dim", [64, 72, 80])
def test_window_attention_equals_fp64(head_dim, dtype):
    lengths = [64, 4, 0, 32, 48, 64, 16]
    windows = Segments.of_lengths(lengths).to(DEVICE)
    qkv, (cos, sin) = drawn(sum(lengths), 3, 4, head_dim, dtype=dtype), angles(sum(lengths), head_dim // 2)
    grad = torch.randn(sum(lengths), 4, head_dim, dtype=dtype, device=DEVICE)
    out = window_attention(qkv, cos, sin, windows, "triton")
    wide = qkv.detach().double().requires_grad_()
    truth = window_reference.window_attention(wide, cos.double(), sin.double(), windows)
    pairs = [(out, truth), (*torch.autograd.grad(out, qkv, grad), *torch.autograd.grad(truth, wide, grad.double()))]
    for ours, true in pairs:
        atol = TOLERANCE[dtype] * max(1.0, true.abs().max().item())
        torch.testing.assert_close(ours.double(), true, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_mrope_equals_fp64(dtype):
    q, k, (cos, sin) = drawn(300, 28, 128, dtype=dtype), drawn(300, 4, 128, dtype=dtype), angles(300, 64)
    for ours, x in zip(apply_mrope(q, k, cos, sin, implementation="triton"), (q, k), strict=True):
        truth = mrope_reference.apply_rope(x.double(), cos.double(), sin.double())
        torch.testing.assert_close(ours.double(), truth, rtol=0, atol=TOLERANCE[dtype])


def test_nothing_waits_for_the_device():
    where = RowMap.of(np.arange(8), np.arange(8)[::-1].copy(), 16, 8).to(DEVICE)
    base, source = drawn(16, 64), drawn(8, 64)
    qkv, (cos, sin) = drawn(48, 3, 2, 80), angles(48, 40)
    windows = Segments.of_lengths([32, 16]).to(DEVICE)

    def run():
        out = merge_rows(base, source, where) + gather_rows(source, where) + add_rows(base, source, where)
        attended = window_attention(qkv, cos, sin, windows)
        turned = apply_mrope(qkv[:, 0], qkv[:, 1], cos, sin)
        (out.sum() + attended.sum() + turned[0].sum() + turned[1].sum()).backward()

    run()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_captured_in_a_graph():
    qkv, (cos, sin) = drawn(48, 3, 2, 80).detach(), angles(48, 40)
    windows = Segments.of_lengths([32, 16]).to(DEVICE)
    eager = window_attention(qkv, cos, sin, windows)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = window_attention(qkv, cos, sin, windows)
    graph.replay()
    assert torch.equal(out, eager)
