"""Times the kernels on a GPU as ratios to the copy bandwidth and matmul rate of the same run, and the CPU path."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from megatron_rb.evaluation.timing import median_ratio, time_in_turn
from megatron_rb.kernels.dynamic_padding import cost as rows_cost
from megatron_rb.kernels.dynamic_padding.op import add_rows, gather_rows
from megatron_rb.kernels.dynamic_padding.row_map import RowMap
from megatron_rb.kernels.mrope import cost as mrope_cost
from megatron_rb.kernels.mrope import reference as mrope_reference
from megatron_rb.kernels.mrope.op import apply_mrope
from megatron_rb.kernels.varlen_attention.op import varlen_attention
from megatron_rb.kernels.varlen_attention.segments import Segments
from megatron_rb.kernels.window_attention import cost as window_cost
from megatron_rb.kernels.window_attention.op import window_attention

BEYOND_CACHE = 256 * 2**20
"""Bytes of buffers that a measurement goes round, several times the largest L2."""

Pass = Callable[[int], object]
"""Runs once on the n-th set of buffers."""


@dataclass(frozen=True)
class Case:
    """One operator at one size."""

    name: str
    bytes: int
    flops: int
    goal: float
    """Share of the copy bandwidth to reach."""
    sides: dict[str, Pass]
    """`ours` first; the others do the same work another way."""


@dataclass(frozen=True)
class Row:
    """A measured case."""

    name: str
    seconds: dict[str, float]
    """Median of each side; a side that cannot run here is missing."""
    copy_share: float
    matmul_share: float
    goal: float
    failed: dict[str, str]
    """Sides that could not run, and why."""

    @property
    def speedups(self) -> dict[str, float]:
        return {name: time / self.seconds["ours"] for name, time in self.seconds.items() if name != "ours"}

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"speedups": self.speedups}


def measure_on_gpu(device: torch.device, repeats: int = 50) -> tuple[dict[str, float], list[Row]]:
    """Ceilings measured here (`copy_bytes_per_second`, `matmul_flops_per_second`), and every case."""
    ceilings = _ceilings(device, repeats)
    cases = (*_rope_cases(device), *_window_cases(device), *_row_cases(device))
    return ceilings, [_measure(make(), ceilings, repeats) for make in cases]


def _ceilings(device: torch.device, repeats: int) -> dict[str, float]:
    source = torch.empty(2**28, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    square = torch.randn(8192, 8192, dtype=torch.bfloat16, device=device)
    copy = _median(lambda number: target.copy_(source), repeats)
    matmul = _median(lambda number: square @ square, repeats)
    return {"copy_bytes_per_second": 2 * source.nbytes / copy, "matmul_flops_per_second": 2 * 8192**3 / matmul}


def _measure(case: Case, ceilings: dict[str, float], repeats: int) -> Row:
    seconds, failed = {}, {}
    for name, side in case.sides.items():
        try:
            seconds[name] = _median(side, repeats)
        except (ImportError, NotImplementedError, RuntimeError, ValueError) as error:
            if name == "ours":
                raise
            failed[name] = str(error).splitlines()[0]
    ours = seconds["ours"]
    copy_share = case.bytes / ours / ceilings["copy_bytes_per_second"]
    matmul_share = case.flops / ours / ceilings["matmul_flops_per_second"]
    return Row(case.name, seconds, copy_share, matmul_share, case.goal, failed)


def _median(run: Pass, repeats: int) -> float:
    """Median seconds on the device."""
    for number in range(5):
        run(number)
    marks = [[torch.Event(enable_timing=True) for _ in "ab"] for _ in range(repeats)]
    for number, (start, stop) in enumerate(marks):
        start.record()
        run(number)
        stop.record()
    torch.accelerator.synchronize()
    return statistics.median(start.elapsed_time(stop) for start, stop in marks) / 1e3


def _sides(buffers: list[torch.Tensor], functions: dict[str, Callable], backward: bool) -> dict[str, Pass]:
    make = _backward if backward else _forward
    return {name: make(buffers, function) for name, function in functions.items()}


def _forward(buffers: list[torch.Tensor], function: Callable) -> Pass:
    return lambda number: function(buffers[number % len(buffers)])


def _backward(buffers: list[torch.Tensor], function: Callable) -> Pass:
    """Backward passes alone, through graphs that the first call builds."""
    graphs: list[tuple] = []

    def run(number: int) -> object:
        if not graphs:
            for buffer in buffers:
                leaf = buffer.detach().requires_grad_()
                out = function(leaf)
                graphs.append((out, leaf, [torch.randn_like(part) for part in _tuple(out)]))
        out, leaf, grads = graphs[number % len(graphs)]
        return torch.autograd.grad(_tuple(out), leaf, grads, retain_graph=True)

    return run


def _tuple(out) -> tuple[torch.Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


@dataclass(frozen=True)
class Work:
    """What a pass has to do at least, and the share of the copy bandwidth it should reach."""

    bytes: int
    flops: int
    goal: float


def _both(
    name: str, forward: Work, backward: Work, buffers: Callable[[], list[torch.Tensor]], functions: dict[str, Callable]
) -> list[Callable[[], Case]]:
    """The forward and the backward case of an operator."""

    def make(suffix: str, work: Work, is_backward: bool) -> Callable[[], Case]:
        return lambda: Case(name + suffix, work.bytes, work.flops, work.goal, _sides(buffers(), functions, is_backward))

    return [make("", forward, False), make(" backward", backward, True)]


def _rope_cases(device: torch.device) -> list[Callable[[], Case]]:
    cases = []
    for name, tokens, heads, groups, dim in (("text mRoPE", 8192, 28, 4, 128), ("vision rotary", 16384, 16, 16, 80)):
        angles = torch.rand(tokens, dim // 2, device=device) * 100
        cos, sin = angles.cos(), angles.sin()

        def eager(x, cos=cos, sin=sin, heads=heads):
            return tuple(mrope_reference.apply_rope(part, cos, sin) for part in x.split([heads, x.shape[1] - heads], 1))

        def ours(x, cos=cos, sin=sin, heads=heads):
            return apply_mrope(x[:, :heads], x[:, heads:], cos, sin)

        flops = mrope_cost.mrope_flops(tokens, heads, groups, dim)
        work = Work(mrope_cost.mrope_bytes(tokens, heads, groups, dim, 2), flops, 0.85)
        functions = {"ours": ours, "eager": eager, "torch.compile": torch.compile(eager)}
        shape = (tokens, heads + groups, dim)
        cases += _both(name, work, work, partial(_drawn, device, shape), functions)
    return cases


def _window_cases(device: torch.device) -> list[Callable[[], Case]]:
    patches, heads, dim, lengths = 16384, 16, 80, [64] * 256
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
        return torch.cat([torch.nn.functional.scaled_dot_product_attention(*part) for part in parts], dim=1)

    functions = {
        "ours": lambda qkv: window_attention(qkv, cos, sin, windows, "triton"),
        "compiled rotary + torch varlen": lambda qkv: varlen(qkv, "torch_varlen"),
        "compiled rotary + flash-attn": lambda qkv: varlen(qkv, "flash_attn"),
        "one SDPA per window": loop,
    }
    forward_flops = window_cost.forward_flops(lengths, heads, dim)
    forward = Work(window_cost.forward_bytes(patches, heads, dim, 2), forward_flops, 0.8)
    backward_flops = window_cost.backward_flops(lengths, heads, dim)
    backward = Work(window_cost.backward_bytes(patches, heads, dim, 2), backward_flops, 0.65)
    shape = (patches, 3, heads, dim)
    return _both("window attention", forward, backward, partial(_drawn, device, shape), functions)


def _row_cases(device: torch.device) -> list[Callable[[], Case]]:
    rows, width = 4096, 3584
    order = torch.randperm(rows).numpy()
    where = RowMap.of(order, order[::-1].copy(), rows, rows).to(device)
    base = torch.randn(rows, width, dtype=torch.bfloat16, device=device)
    gather = {"ours": lambda x: gather_rows(x, where), "eager": lambda x: x.index_select(0, where.sources)}
    add = {"ours": lambda x: add_rows(base, x, where), "eager": lambda x: base.index_add(0, where.rows, x)}
    gather_cost, add_cost = rows_cost.gather_bytes(rows, rows, width, 2), rows_cost.add_bytes(rows, rows, width, 2)

    def make(name: str, cost: int, functions: dict[str, Callable]) -> Callable[[], Case]:
        return lambda: Case(name, cost, 0, 0.9, _sides(_drawn(device, (rows, width)), functions, backward=False))

    return [make("row gather", gather_cost, gather), make("row scatter-add", add_cost, add)]


def _drawn(device: torch.device, shape: tuple[int, ...]) -> list[torch.Tensor]:
    """Enough tensors that none is still in the cache when its turn comes."""
    first = torch.randn(shape, device=device, dtype=torch.bfloat16)
    return [first, *(torch.randn_like(first) for _ in range(BEYOND_CACHE // first.nbytes))]


def windows_on_cpu(rounds: int, lengths: list[int], heads: int = 4, head_dim: int = 80) -> float:
    """Time of transformers' window loop / ours, forward and backward, fp32; above 1 ours is faster."""
    from megatron_rb.kernels.varlen_attention.torch_impl import varlen_attention as torch_attention

    windows = Segments.of_lengths(lengths)
    draw = torch.Generator().manual_seed(0)
    qkv = torch.randn(sum(lengths), 3, heads, head_dim, generator=draw, requires_grad=True)
    angles = torch.rand(sum(lengths), head_dim // 2, generator=draw) * 50
    cos, sin = angles.cos(), angles.sin()

    def loop():
        q, k, v = qkv.unbind(1)
        q, k = mrope_reference.apply_rope(q, cos, sin), mrope_reference.apply_rope(k, cos, sin)
        # One call for every window, as transformers' tower does without flash-attn.
        parts = zip(*(part.split(lengths) for part in (q, k, v)), strict=True)
        one = (torch_attention(*part, Segments.of_lengths([part[0].shape[0]]), False) for part in parts)
        torch.autograd.grad(torch.cat(list(one)).sum(), qkv)

    def ours():
        torch.autograd.grad(window_attention(qkv, cos, sin, windows).sum(), qkv)

    times = time_in_turn({"ours": ours, "loop": loop}, rounds)
    return median_ratio(times["loop"].cpu, times["ours"].cpu)
