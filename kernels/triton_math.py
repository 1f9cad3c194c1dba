"""Arithmetic the Triton kernels share: conversions and products that mean the same compiled and interpreted.

Triton's interpreter (3.7) cuts fp32 to bf16 where hardware rounds to nearest even, and computes wrong values from bf16
operands. So every kernel computes in fp32, and under the interpreter these functions round and widen explicitly.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_rb.kernels.triton_runtime import interpreting

INTERPRETING = tl.constexpr(interpreting())


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """fp32 values in another type, rounded to nearest even."""
    if INTERPRETING and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """fp32 values that are exact in another type."""
    return narrow(x, dtype).to(tl.float32)


@triton.jit
def dot(a, b):
    """`a @ b`, summed in fp32; a product of two half-precision values is exact there."""
    if INTERPRETING and a.dtype == tl.bfloat16:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee", out_dtype=tl.float32)
