"""What the kernels are timed at, and what they are timed beside: torch, torch.compile, flash-attn, Liger-Kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F

from megatron_rb.kernels.dynamic_padding import cost as rows_cost
from megatron_rb.kernels.dynamic_padding.op import add_rows, gather_rows
from megatron_rb.kernels.dynamic_padding.row_map import RowMap, padding
from megatron_rb.kernels.linear_cross_entropy import cost as loss_cost
from megatron_rb.kernels.linear_cross_entropy import reference as loss_reference
from megatron_rb.kernels.linear_cross_entropy.op import linear_cross_entropy
from megatron_rb.kernels.mrope import cost as mrope_cost
from megatron_rb.kernels.mrope import reference as mrope_reference
from megatron_rb.kernels.mrope.op import apply_mrope
from megatron_rb.kernels.rms_norm import cost as norm_cost
from megatron_rb.kernels.rms_norm import reference as norm_reference
from megatron_rb.kernels.rms_norm.op import rms_norm
from megatron_rb.kernels.swiglu import cost as swiglu_cost
from megatron_rb.kernels.swiglu import reference as swiglu_reference
from megatron_rb.kernels.swiglu.op import swiglu
from megatron_rb.kernels.varlen_attention.op import varlen_attention
from megatron_rb.kernels.varlen_attention.segments import Segments
from megatron_rb.kernels.window_attention import cost as window_cost
from megatron_rb.kernels.window_attention.op import window_attention

BEYOND_CACHE = 256 * 2**20
"""Bytes of buffers that a measurement goes round, several times the largest L2."""

Pass = Callable[[int], object]
"""Runs once on the n-th set of buffers."""


@dataclass(frozen=True)
class KernelCase:
    """One operator at one size."""

    name: str
    bytes: int
    flops: int
    goal: float | None
    """Share of the copy bandwidth to reach; None = no goal."""
    sides: dict[str, Pass]
    """`ours` first; the others do the same work another way."""
    at_least: dict[str, float] = field(default_factory=dict)
    """How many times as fast as another side it should be."""
    most_repeats: int = 1000


@dataclass(frozen=True)
class Sizes:
    """What is timed; the defaults are those that the goals speak of."""

    tokens: int = 8192
    patches: int = 16384
    rows: int = 4096
    width: int = 3584
    ffn: int = 9472
    vocabulary: int = 38016
    """Of RoboBrain 2.0 7B on one of four tensor-parallel ranks."""
    cache: int = BEYOND_CACHE
    dtype: torch.dtype = torch.bfloat16


Makers = list[Callable[[], KernelCase]]


def all_cases(device: torch.device, sizes: Sizes = Sizes()) -> Makers:
    """Every case, made when it is its turn: their buffers do not fit into memory together."""
    makers = (_rope_cases, _window_cases, _row_cases, _norm_and_gate_cases, _loss_cases)
    return [make for maker in makers for make in maker(device, sizes)]


Buffers = list[tuple[torch.Tensor, ...]]
"""Arguments of one call after the other."""


def _sides(buffers: Buffers, functions: dict[str, Callable], backward: bool) -> dict[str, Pass]:
    make = _backward if backward else _forward
    return {name: make(buffers, function) for name, function in functions.items()}


def _forward(buffers: Buffers, function: Callable) -> Pass:
    return lambda number: function(*buffers[number % len(buffers)])


def _backward(buffers: Buffers, function: Callable) -> Pass:
    """Backward passes alone, through graphs that the first call builds."""
    graphs: list[tuple] = []

    def run(number: int) -> object:
        if not graphs:
            for buffer in buffers:
                leaves = [x.detach().requires_grad_() for x in buffer]
                out = function(*leaves)
                draw = torch.Generator(leaves[0].device).manual_seed(0)
                grads = [
                    torch.randn(part.shape, generator=draw, dtype=part.dtype, device=part.device)
                    for part in _tuple(out)
                ]
                graphs.append((out, leaves, grads))
        out, leaves, grads = graphs[number % len(graphs)]
        return torch.autograd.grad(_tuple(out), leaves, grads, retain_graph=True)

    return run


def _tuple(out) -> tuple[torch.Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


@dataclass(frozen=True)
class LeastWork:
    """What a pass has to do at least, and the share of the copy bandwidth it should reach."""

    bytes: int
    flops: int
    goal: float | None = None
    at_least: dict[str, float] = field(default_factory=dict)


def _both(
    name: str, forward: LeastWork, backward: LeastWork, buffers: Callable[[], Buffers], functions: dict[str, Callable]
) -> Makers:
    """The forward and the backward case of an operator."""

    def make(suffix: str, work: LeastWork, is_backward: bool) -> Callable[[], KernelCase]:
        return lambda: KernelCase(
            name + suffix, work.bytes, work.flops, work.goal, _sides(buffers(), functions, is_backward), work.at_least
        )

    return [make("", forward, False), make(" backward", backward, True)]


def _rope_cases(device: torch.device, sizes: Sizes) -> Makers:
    return [
        *_rope("text mRoPE", device, sizes, sizes.tokens, (28, 4, 128)),
        *_rope("vision rotary", device, sizes, sizes.patches, (16, 16, 80)),
    ]


def _rope(name: str, device: torch.device, sizes: Sizes, tokens: int, shape: tuple[int, int, int]) -> Makers:
    heads, groups, dim = shape
    angles = torch.rand(tokens, dim // 2, device=device) * 100
    cos, sin = angles.cos(), angles.sin()

    def eager(q, k):
        return mrope_reference.apply_rope(q, cos, sin), mrope_reference.apply_rope(k, cos, sin)

    functions: dict[str, Callable] = {
        "ours": lambda q, k: apply_mrope(q, k, cos, sin),
        "eager": eager,
        "torch.compile": torch.compile(eager),
    }
    is_text = name.startswith("text")
    if is_text:
        functions["Liger"] = partial(_liger_mrope, *(torch.cat((x, x), -1)[None, None] for x in (cos, sin)))
    faster = {"torch.compile": 1.0, "eager": 4.0} if is_text else {}
    flops = mrope_cost.mrope_flops(tokens, heads, groups, dim)
    work = LeastWork(mrope_cost.mrope_bytes(tokens, heads, groups, dim, 2), flops, 0.85, faster)
    buffers = partial(_drawn, device, sizes, (tokens, heads, dim), (tokens, groups, dim))
    return _both(name, work, work, buffers, functions)


def _liger_mrope(cos: torch.Tensor, sin: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Liger-Kernel's multimodal rotary, which wants heads in front of tokens and the angles of every axis.

    Args:
        cos, sin: `[1, 1, tokens, head_dim]`.
    """
    from liger_kernel.ops import LigerQwen2VLMRopeFunction  # optional

    heads_first = (x.transpose(0, 1).unsqueeze(0) for x in (q, k))
    angles = (x.expand(3, -1, -1, -1).contiguous() for x in (cos, sin))
    turned = LigerQwen2VLMRopeFunction.apply(*heads_first, *angles, [16, 24, 24])
    return tuple(x.squeeze(0).transpose(0, 1) for x in turned)


def _window_cases(device: torch.device, sizes: Sizes) -> Makers:
    patches, heads, dim, lengths = sizes.patches, 16, 80, [64] * (sizes.patches // 64)
    windows = Segments.of_lengths(lengths).to(device)
    angles = torch.rand(patches, dim // 2, device=device) * 50
    cos, sin = angles.cos(), angles.sin()
    rotate = torch.compile(lambda x: mrope_reference.apply_rope(x, cos, sin))

    def varlen(qkv, implementation: str):
        q, k, v = qkv.unbind(1)
        return varlen_attention(rotate(q), rotate(k), v, windows, False, implementation)

    def loop(qkv):
        q, k, v = (part.transpose(0, 1) for part in qkv.unbind(1))
        q, k = (mrope_reference.apply_rope(part.transpose(0, 1), cos, sin).transpose(0, 1) for part in (q, k))
        parts = zip(*(part.split(lengths, dim=1) for part in (q, k, v)), strict=True)
        return torch.cat([F.scaled_dot_product_attention(*part) for part in parts], dim=1).transpose(0, 1)

    functions = {
        "ours": lambda qkv: window_attention(qkv, cos, sin, windows),
        "compiled rotary + torch varlen": lambda qkv: varlen(qkv, "torch_varlen"),
        "compiled rotary + flash-attn": lambda qkv: varlen(qkv, "flash_attn"),
        "one SDPA per window": loop,
    }
    forward_flops = window_cost.forward_flops(lengths, heads, dim)
    flash = "compiled rotary + flash-attn", "compiled rotary + torch varlen"
    faster = dict.fromkeys(flash, 1.8) | {"one SDPA per window": 100.0}
    forward = LeastWork(window_cost.forward_bytes(patches, heads, dim, 2), forward_flops, 0.8, faster)
    backward_flops = window_cost.backward_flops(lengths, heads, dim)
    faster = dict.fromkeys(flash, 3.0)
    backward = LeastWork(window_cost.backward_bytes(patches, heads, dim, 2), backward_flops, 0.65, faster)
    buffers = partial(_drawn, device, sizes, (patches, 3, heads, dim))
    return _both("window attention", forward, backward, buffers, functions)


def _row_cases(device: torch.device, sizes: Sizes) -> Makers:
    rows, width = sizes.rows, sizes.width
    order = torch.randperm(rows).numpy()
    where = RowMap.of(order, order[::-1].copy(), rows, rows).to(device)
    wider = padding(rows, rows + 512).to(device)
    base = torch.randn(rows, width, dtype=sizes.dtype, device=device)
    gather = {"ours": lambda x: gather_rows(x, where), "eager": lambda x: x.index_select(0, where.index)}
    add = {"ours": lambda x: add_rows(base, x, where), "eager": lambda x: base + x.index_select(0, where.index)}
    pad = {"ours": lambda x: gather_rows(x, wider), "eager": lambda x: F.pad(x, (0, 0, 0, 512))}
    gather_cost, add_cost = rows_cost.gather_bytes(rows, rows, width, 2), rows_cost.add_bytes(rows, rows, width, 2)
    pad_cost = rows_cost.gather_bytes(rows + 512, rows, width, 2)

    def make(name: str, cost: int, functions: dict[str, Callable]) -> Callable[[], KernelCase]:
        return lambda: KernelCase(name, cost, 0, 0.9, _sides(_drawn(device, sizes, (rows, width)), functions, False))

    return [
        make("row gather", gather_cost, gather),
        make("row scatter-add", add_cost, add),
        make("row pad", pad_cost, pad),
    ]


def _norm_and_gate_cases(device: torch.device, sizes: Sizes) -> Makers:
    rows, size, ffn = sizes.tokens, sizes.width, sizes.ffn
    weight = torch.randn(size, dtype=sizes.dtype, device=device)

    def norm(x):
        return norm_reference.rms_norm(x, weight, 1e-6)

    norms = {"ours": lambda x: rms_norm(x, weight, 1e-6), "eager": norm, "torch.compile": torch.compile(norm)}
    gates = {"ours": swiglu, "eager": swiglu_reference.swiglu, "torch.compile": torch.compile(swiglu_reference.swiglu)}
    norm_works = (LeastWork(cost(rows, size, 2), 0) for cost in (norm_cost.forward_bytes, norm_cost.backward_bytes))
    gate_works = (LeastWork(cost(rows, ffn, 2), 0) for cost in (swiglu_cost.forward_bytes, swiglu_cost.backward_bytes))
    return [
        *_both("RMSNorm", next(norm_works), next(norm_works), partial(_drawn, device, sizes, (rows, size)), norms),
        *_both("SwiGLU", next(gate_works), next(gate_works), partial(_drawn, device, sizes, (rows, 2 * ffn)), gates),
    ]


def _loss_cases(device: torch.device, sizes: Sizes) -> Makers:
    """Forward and backward of the head."""
    rows, size, vocabulary = sizes.rows, sizes.width, sizes.vocabulary
    labels = torch.randint(0, vocabulary, (rows,), device=device)
    ones = torch.ones(rows, device=device)

    def liger(hidden, weight):
        from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction  # optional

        return LigerFusedLinearCrossEntropyFunction.apply(
            hidden, weight, labels, None, None, -100, 0.0, 0.0, "sum", None, False, torch.float32
        )[0]

    def ours(hidden, weight, implementation="auto"):
        return linear_cross_entropy(hidden, weight, labels, ones, implementation=implementation)

    losses: dict[str, Callable] = {
        "ours": ours,
        "in torch": partial(ours, implementation="torch"),
        "all logits in memory": lambda h, w: loss_reference.linear_cross_entropy(h, w, labels, ones),
        "Liger fused linear": liger,
    }

    def both(loss: Callable, hidden: torch.Tensor, weight: torch.Tensor) -> Pass:
        return lambda number: torch.autograd.grad(loss(hidden, weight), (hidden, weight))

    def make() -> KernelCase:
        weight = torch.randn(vocabulary, size, dtype=sizes.dtype, device=device).mul_(0.02).requires_grad_()
        hidden = torch.randn(rows, size, dtype=sizes.dtype, device=device).requires_grad_()
        sides = {name: both(loss, hidden, weight) for name, loss in losses.items()}
        bytes_moved = 2 * (2 * hidden.nbytes + 2 * weight.nbytes)
        return KernelCase(
            "linear + cross entropy, both passes",
            bytes_moved,
            loss_cost.flops(rows, size, vocabulary),
            None,
            sides,
            most_repeats=20,
        )

    return [make]


def _drawn(device: torch.device, sizes: Sizes, *shapes: tuple[int, ...]) -> Buffers:
    """Enough tensors that none is still in the cache when its turn comes."""

    def once() -> tuple[torch.Tensor, ...]:
        return tuple(torch.randn(shape, device=device, dtype=sizes.dtype) for shape in shapes)

    first = once()
    return [first, *(once() for _ in range(sizes.cache // sum(x.nbytes for x in first)))]
