"""Every public function of the kernels with small arguments, for tests of what holds for all of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from megatron_rb.kernels.dynamic_padding.op import add_rows, gather_rows, merge_rows
from megatron_rb.kernels.dynamic_padding.row_map import RowMap
from megatron_rb.kernels.linear_cross_entropy.op import linear_cross_entropy
from megatron_rb.kernels.mrope.op import apply_mrope, qk_norm_mrope
from megatron_rb.kernels.rms_norm.op import rms_norm
from megatron_rb.kernels.swiglu.op import swiglu
from megatron_rb.kernels.varlen_attention.op import varlen_attention
from megatron_rb.kernels.varlen_attention.segments import Segments
from megatron_rb.kernels.window_attention.op import window_attention

NAMES = (
    "apply_mrope",
    "qk_norm_mrope",
    "window_attention",
    "varlen_attention",
    "varlen_attention_with_keys",
    "gather_rows",
    "merge_rows",
    "add_rows",
    "linear_cross_entropy",
    "rms_norm",
    "swiglu",
)
Case = tuple[Callable[..., torch.Tensor], tuple[torch.Tensor, ...]]
"""A function that gives one tensor, and its arguments, which need gradients."""


def case(name: str, device: torch.device, dtype: torch.dtype) -> Case:
    """One public function; what it takes beside tensors with gradients is bound."""
    tokens, half = 48, 32
    draw = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw).to(device, dtype).requires_grad_()

    angles = (torch.rand(tokens, half, generator=draw) * 50).to(device)
    cos, sin = angles.cos(), angles.sin()
    segments = Segments.of_lengths([32, 0, 16]).to(device)
    longer = Segments.of_lengths([40, 0, 24]).to(device)
    where = RowMap.of(np.arange(8) * 2, np.arange(8)[::-1].copy(), 16, 10).to(device)
    labels = (torch.arange(tokens) * 3).to(device)
    weights = torch.rand(tokens, generator=draw).to(device)
    heads, keys, rows, sources = (2 * half,), (tokens, 2, 2 * half), (16, 64), (10, 64)
    cases: dict[str, Callable[[], Case]] = {
        "apply_mrope": lambda: (
            lambda q, k: torch.cat(apply_mrope(q, k, cos, sin), 1),
            (drawn(tokens, 4, 2 * half), drawn(*keys)),
        ),
        "qk_norm_mrope": lambda: (
            lambda q, k, a, b: torch.cat(qk_norm_mrope(q, k, a, b, cos, sin, 1e-6), 1),
            (drawn(tokens, 4, 2 * half), drawn(*keys), drawn(*heads), drawn(*heads)),
        ),
        "window_attention": lambda: (
            lambda qkv: window_attention(qkv, cos, sin, segments),
            (drawn(tokens, 3, 2, 2 * half),),
        ),
        "varlen_attention": lambda: (
            lambda q, k, v: varlen_attention(q, k, v, segments, True),
            (drawn(tokens, 4, 2 * half), drawn(*keys), drawn(*keys)),
        ),
        "varlen_attention_with_keys": lambda: (
            lambda q, k, v: varlen_attention(q, k, v, segments, True, keys=longer),
            (drawn(tokens, 4, 2 * half), drawn(64, 2, 2 * half), drawn(64, 2, 2 * half)),
        ),
        "gather_rows": lambda: (lambda source: gather_rows(source, where), (drawn(*sources),)),
        "merge_rows": lambda: (lambda base, source: merge_rows(base, source, where), (drawn(*rows), drawn(*sources))),
        "add_rows": lambda: (lambda base, source: add_rows(base, source, where), (drawn(*rows), drawn(*sources))),
        "linear_cross_entropy": lambda: (
            lambda hidden, weight: linear_cross_entropy(hidden, weight, labels, weights, logits_bytes=4 * 144 * 20),
            (drawn(tokens, 64), drawn(144, 64)),
        ),
        "rms_norm": lambda: (lambda x, weight: rms_norm(x, weight, 1e-6), (drawn(tokens, 1, 64), drawn(64))),
        "swiglu": lambda: (swiglu, (drawn(tokens, 1, 128),)),
    }
    assert tuple(cases) == NAMES
    return cases[name]()


def gradients(out: torch.Tensor, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Of a weighted sum of the output, with weights that are the same every time."""
    weights = torch.linspace(0.5, 1.5, out.numel(), device=out.device).view(out.shape)
    return torch.autograd.grad((out.float() * weights).sum(), inputs)
