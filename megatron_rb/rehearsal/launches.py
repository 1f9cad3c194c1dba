"""Triton kernels that a rehearsed step would start: their arguments are bound and checked, nothing is compiled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megatron_rb.kernels.triton_runtime import why_no_triton
from megatron_rb.platform import Platform
from megatron_rb.rehearsal.sites import site
from megatron_rb.rehearsal.stand_ins import StandIns

CONSTANT = "constexpr"
ALIGNMENT = 16
GRID_LIMITS = (2**31 - 1, 65535, 65535)
"""Most programs along each axis on CUDA devices."""
LAUNCH_OPTIONS = frozenset(
    {
        "num_warps",
        "num_stages",
        "num_ctas",
        "maxnreg",
        "launch_cooperative_grid",
        "launch_pdl",
        "ir_override",
        "debug",
        "enable_fp_fusion",
        "allow_fp8e4nv",
        "grf_mode",
    }
)
"""Keywords of a launch that are no arguments of the kernel."""


@dataclass(frozen=True)
class Launch:
    """One way in which a kernel is started."""

    kernel: str
    """`module:function`"""
    arguments: tuple[tuple[str, str], ...]
    """Name and type as Triton writes it (`*bf16`, `i32`, `fp32`), `constexpr` for what is compiled in."""
    constants: tuple[tuple[str, Any], ...]
    """Name and value of what is compiled in."""
    aligned: tuple[str, ...]
    """Arguments that are multiples of 16 (tensors begin at one), which Triton compiles for."""
    options: tuple[tuple[str, Any], ...]
    """Keywords of the launch, e.g. `num_warps`."""
    site: str


class Launches:
    """Counts starts of kernels by what they are started with."""

    def __init__(self) -> None:
        self.seen: Counter[Launch] = Counter()

    def restart(self) -> None:
        self.seen = Counter()

    def record(self, function: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], grid: Any) -> None:
        """Bind the arguments as Triton's launcher does.

        Raises:
            TypeError: an argument is missing or unknown.
            RuntimeError: a tensor is not on the device, or the grid is larger than the device takes.
        """
        name = f"{function.fn.__module__}:{function.fn.__name__}"
        bound = dict(zip([parameter.name for parameter in function.params], arguments, strict=False))
        options = {key: keywords.pop(key) for key in list(keywords) if key in LAUNCH_OPTIONS and key not in bound}
        bound |= keywords
        self._check(name, function, bound, grid(bound) if callable(grid) else grid)
        kinds, constants, aligned = [], [], []
        for parameter in function.params:
            value = bound.get(parameter.name, parameter.default if parameter.has_default else None)
            kind = _type_of(parameter, value)
            kinds.append((parameter.name, kind))
            if kind == CONSTANT:
                constants.append((parameter.name, value))
            elif isinstance(value, torch.Tensor) or isinstance(value, int) and value % ALIGNMENT == 0:
                aligned.append(parameter.name)
        known = tuple(sorted(options.items()))
        self.seen[Launch(name, tuple(kinds), tuple(constants), tuple(aligned), known, site())] += 1

    def _check(self, name: str, function: Any, bound: Mapping[str, Any], grid: tuple[Any, ...]) -> None:
        known = {parameter.name for parameter in function.params}
        unknown = sorted(set(bound) - known)
        missing = [each.name for each in function.params if each.name not in bound and not each.has_default]
        if unknown or missing:
            raise TypeError(f"Triton kernel {name} is started with {unknown} unknown and without {missing}")
        for key, value in bound.items():
            if isinstance(value, torch.Tensor) and value.device.type != "cuda":
                raise RuntimeError(f"Triton kernel {name}: {key} is on {value.device}, not on the device")
        if any(not 0 <= int(size) <= limit for size, limit in zip(grid, GRID_LIMITS, strict=False)):
            raise RuntimeError(f"Triton kernel {name}: a grid of {tuple(grid)} is over the limits {GRID_LIMITS}")


def _type_of(parameter: Any, value: Any) -> str:
    """As Triton specialises arguments: numbers that are 1 and everything that is no number are compiled in."""
    if isinstance(value, torch.Tensor):
        return "*" + _TYPES[value.dtype]
    if parameter.is_constexpr or value is None or not isinstance(value, bool | int | float):
        return CONSTANT
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return CONSTANT if value == 1 else "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}


def stand_in_for_triton(stand_ins: StandIns, launches: Launches, platform: Platform) -> None:
    """Record starts of Triton kernels where they would be compiled and run; nothing to do without Triton."""
    if why_no_triton(platform) is not None:
        return
    from triton.runtime import autotuner, jit  # optional

    def run(function: Any, *arguments: Any, grid: Any = None, warmup: bool = False, **keywords: Any) -> None:
        launches.record(function, arguments, keywords, grid)

    def run_first(tuner: Any, *arguments: Any, **keywords: Any) -> Any:
        return tuner.fn.run(*arguments, **{**keywords, **tuner.configs[0].all_kwargs()})

    stand_ins.set(jit.JITFunction, "run", run)
    stand_ins.set(autotuner.Autotuner, "run", run_first)
