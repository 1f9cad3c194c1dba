"""Liger-Kernel's operators as they are called here, against the definitions in fp64."""

import pytest
import torch

from megatron_rb.kernels.linear_cross_entropy import reference as loss_reference
from megatron_rb.kernels.linear_cross_entropy.op import linear_cross_entropy
from megatron_rb.kernels.rms_norm import reference as norm_reference
from megatron_rb.kernels.rms_norm.op import rms_norm
from megatron_rb.kernels.swiglu import reference as swiglu_reference
from megatron_rb.kernels.swiglu.op import swiglu
from megatron_rb.platform.base import module_exists

pytestmark = pytest.mark.skipif(not module_exists("liger_kernel"), reason="liger-kernel is not installed")
TOLERANCE = {torch.float32: 3e-6, torch.float16: 4e-3}
"""bf16 is left out: these kernels compute in it, and the interpreter's bf16 arithmetic is wrong."""


def drawn(*shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def check(ours, inputs, definition, dtype):
    """Output and gradients of all inputs against the definition in fp64."""
    wide = [x.detach().double().requires_grad_() for x in inputs]
    truth = definition(*wide)
    grad = torch.randn(truth.shape, generator=torch.Generator().manual_seed(9))
    mine = (ours, *torch.autograd.grad(ours, inputs, grad.to(ours.dtype)))
    its = (truth, *torch.autograd.grad(truth, wide, grad.to(ours.dtype).double()))
    for got, wanted in zip(mine, its, strict=True):
        atol = TOLERANCE[dtype] * max(1.0, wanted.abs().max().item())
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("rows_at_a_time", [3, 100])
def test_loss_and_gradients(dtype, rows_at_a_time):
    hidden, weight = drawn(7, 16, dtype=dtype), drawn(50, 16, dtype=dtype, seed=1)
    labels, weights = torch.arange(7) * 7, torch.rand(7, generator=torch.Generator().manual_seed(2))
    labels[2], weights[3] = loss_reference.IGNORED, 0.0
    options = {"logits_bytes": 4 * 50 * rows_at_a_time, "implementation": "liger"}
    ours = linear_cross_entropy(hidden, weight, labels, weights, **options)
    assert ours.dtype == torch.float32
    check(ours, [hidden, weight], lambda h, w: loss_reference.linear_cross_entropy(h, w, labels, weights), dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_gate(dtype):
    x = drawn(5, 1, 48, dtype=dtype)
    check(swiglu(x, "liger"), [x], swiglu_reference.swiglu, dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_norm(dtype, compiled_scalars):
    x, weight = drawn(5, 1, 48, dtype=dtype), drawn(48, dtype=dtype, seed=1)
    check(rms_norm(x, weight, 1e-6, "liger"), [x, weight], lambda a, b: norm_reference.rms_norm(a, b, 1e-6), dtype)


@pytest.fixture
def compiled_scalars(monkeypatch):
    """What the interpreter lacks for these kernels: floats as fp32 scalars, and a device library.

    The interpreter hands floats on as floats of Python, and of the device library's functions it knows none.
    """
    import numpy as np  # these only where triton and liger-kernel are installed
    import triton.language as tl
    from liger_kernel.ops import rms_norm as module
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def with_floats(argument):
        if isinstance(argument, float):
            return tl.tensor(interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32), tl.float32)
        return convert(argument)

    monkeypatch.setattr(interpreter, "_implicit_cvt", with_floats)
    monkeypatch.setattr(module, "rsqrt", lambda x: tl.rsqrt(x))  # looked up while the interpreter stands in
