"""The Triton kernels on a real device: values against fp64, and no wait of the host for the device."""

import pytest
import torch

from megatron_rb.kernels.dispatch import TABLE, Call, why_not
from megatron_rb.kernels.linear_cross_entropy import reference as loss_reference
from megatron_rb.kernels.linear_cross_entropy.op import linear_cross_entropy
from megatron_rb.kernels.mrope import reference as mrope_reference
from megatron_rb.kernels.mrope.op import apply_mrope
from megatron_rb.kernels.rms_norm import reference as norm_reference
from megatron_rb.kernels.rms_norm.op import rms_norm
from megatron_rb.kernels.swiglu import reference as swiglu_reference
from megatron_rb.kernels.swiglu.op import swiglu
from megatron_rb.kernels.varlen_attention import reference as varlen_reference
from megatron_rb.kernels.varlen_attention.op import varlen_attention
from megatron_rb.kernels.varlen_attention.segments import Segments
from megatron_rb.kernels.window_attention import reference as window_reference
from megatron_rb.kernels.window_attention.op import window_attention
from megatron_rb.platform import get_platform
from tests.unit.kernels.public_functions import NAMES, case, gradients

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
@pytest.mark.parametrize("implementation", ["flash_attn_3", "flash_attn", "flash_attn_4", "torch_varlen", "torch"])
def test_queries_at_the_end_of_longer_keys_equal_fp64(implementation, dtype):
    """Every library has to align the causal mask at the end of both: context parallelism relies on it."""
    row = next(row for row in TABLE["varlen_attention"] if row.name == implementation)
    reason = why_not(row, get_platform("cuda"), Call(dtype, 64), requested=True)
    if reason is not None:
        pytest.skip(reason)
    queries, keys = (Segments.of_lengths(lengths).to(DEVICE) for lengths in ([40, 64, 7], [100, 64, 80]))
    inputs = [drawn(rows, heads, 64, dtype=dtype) for rows, heads in ((111, 8), (244, 2), (244, 2))]
    out = varlen_attention(*inputs, queries, True, implementation, keys)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    truth = varlen_reference.varlen_attention(*wide, queries, True, keys)
    for mine, its in zip((out, *gradients(out, inputs)), (truth, *gradients(truth, wide)), strict=True):
        atol = TOLERANCE[dtype] * max(1.0, its.abs().max().item())
        torch.testing.assert_close(mine.double(), its, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_mrope_equals_fp64(dtype):
    q, k, (cos, sin) = drawn(300, 28, 128, dtype=dtype), drawn(300, 4, 128, dtype=dtype), angles(300, 64)
    for ours, x in zip(apply_mrope(q, k, cos, sin, implementation="triton"), (q, k), strict=True):
        truth = mrope_reference.apply_rope(x.double(), cos.double(), sin.double())
        torch.testing.assert_close(ours.double(), truth, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("name", NAMES)
def test_nothing_waits_for_the_device(name):
    run, inputs = case(name, DEVICE, torch.bfloat16)
    gradients(run(*inputs), inputs)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(run(*inputs), inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", NAMES)
def test_compiled_and_recomputed_it_gives_the_same(name):
    run, inputs = case(name, DEVICE, torch.bfloat16)
    eager = run(*inputs)
    wanted = (eager, *gradients(eager, inputs))
    torch._dynamo.reset()
    for again in (
        torch.compile(run, fullgraph=True)(*inputs),
        torch.utils.checkpoint.checkpoint(run, *inputs, use_reentrant=False),
    ):
        for mine, its in zip((again, *gradients(again, inputs)), wanted, strict=True):
            atol = TOLERANCE[torch.bfloat16] * max(1.0, its.abs().max().item())
            torch.testing.assert_close(mine.float(), its.float(), rtol=0, atol=atol)


@pytest.mark.parametrize("name", NAMES)
def test_captured_in_a_graph_forward_and_backward(name):
    run, inputs = case(name, DEVICE, torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # a capture needs everything to have run before, elsewhere
        for _ in range(3):
            gradients(run(*inputs), inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(*inputs)
        captured = gradients(out, inputs)
    # Other values in the same memory: a graph that is replayed reads them.
    with torch.no_grad():
        for x in inputs:
            x.mul_(0.5)
    graph.replay()
    eager = run(*inputs)
    for mine, its in zip((out, *captured), (eager, *gradients(eager, inputs)), strict=True):
        torch.testing.assert_close(mine.float(), its.float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("implementation", ["torch", "liger"])
def test_loss_and_gradients_equal_fp64(implementation):
    if implementation == "liger":
        pytest.importorskip("liger_kernel")
    hidden, weight = drawn(200, 256), drawn(3000, 256)
    labels, weights = torch.randint(0, 3000, (200,), device=DEVICE), torch.rand(200, device=DEVICE)
    ours = linear_cross_entropy(
        hidden, weight, labels, weights, logits_bytes=4 * 3000 * 64, implementation=implementation
    )
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    truth = loss_reference.linear_cross_entropy(*wide, labels, weights)
    got, wanted = torch.autograd.grad(ours, (hidden, weight)), torch.autograd.grad(truth, wide)
    for mine, its in zip((ours, *got), (truth, *wanted), strict=True):
        torch.testing.assert_close(mine.double(), its, rtol=0, atol=3e-2 * its.abs().max().item())


@pytest.mark.parametrize("operator", ["rms_norm", "swiglu"])
def test_norm_and_gate_equal_fp64(operator):
    pytest.importorskip("liger_kernel")
    x, weight = drawn(64, 1, 512), drawn(512)
    run, definition, inputs = {
        "rms_norm": (
            lambda a, b: rms_norm(a, b, 1e-6, "liger"),
            lambda a, b: norm_reference.rms_norm(a, b, 1e-6),
            (x, weight),
        ),
        "swiglu": (lambda a: swiglu(a, "liger"), swiglu_reference.swiglu, (x,)),
    }[operator]
    ours, wide = run(*inputs), [part.detach().double().requires_grad_() for part in inputs]
    truth = definition(*wide)
    for mine, its in zip((ours, *gradients(ours, inputs)), (truth, *gradients(truth, wide)), strict=True):
        torch.testing.assert_close(mine.double(), its, rtol=0, atol=3e-2 * max(1.0, its.abs().max().item()))
