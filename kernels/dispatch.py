"""Which implementation an operator takes: one table, asked with the platform, dtype and sizes of the call."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from typing import Any

import torch

from megatron_rb.kernels.triton_runtime import why_no_triton
from megatron_rb.platform import Platform, get_platform
from megatron_rb.platform.base import module_exists

logger = logging.getLogger(__name__)

HALF = (torch.float16, torch.bfloat16)
FLOATS = (*HALF, torch.float32)
EVERYWHERE = ("cpu", "cuda", "musa")
FLASH_ATTN_4 = "flash-attn-4"
"""A distribution: flash-attn 2 brings an early `flash_attn.cute` along, with other arguments."""


@dataclass(frozen=True)
class Implementation:
    """One row of the table."""

    name: str
    default_on: tuple[str, ...]
    """Platforms on which `auto` may take it."""
    on_request: tuple[str, ...] = ()
    """Platforms on which it runs when it is asked for by name."""
    needs: str = ""
    """`triton`, a capability of the platform, a distribution, or a module; empty = nothing beside torch."""
    dtypes: tuple[torch.dtype, ...] = FLOATS
    min_arch: tuple[int, int] = (0, 0)
    """Smallest compute capability on cuda."""
    max_head_dim: int = 0
    """0 = any."""
    head_dim_multiple: int = 1
    max_length: int = 0
    """Longest sequence it takes; 0 = any."""


@dataclass(frozen=True)
class Call:
    """What the choice depends on."""

    dtype: torch.dtype
    head_dim: int = 0
    """0 for operators without heads."""
    longest: int = 0
    """Rows of the longest sequence; 0 when it does not matter."""


_TRITON_ROPE = Implementation("triton", ("cuda",), ("musa", "cpu"), "triton", max_head_dim=256, head_dim_multiple=2)
_TORCH = Implementation("torch", EVERYWHERE, dtypes=(*FLOATS, torch.float64))

TABLE: Mapping[str, tuple[Implementation, ...]] = {
    "mrope": (_TRITON_ROPE, _TORCH),
    "qk_norm_mrope": (_TRITON_ROPE, _TORCH),
    "window_attention": (
        # Moore Threads' compiler has not been seen to take the small dot products, so there it has to be asked for.
        Implementation(
            "triton",
            ("cuda",),
            ("musa", "cpu"),
            "triton",
            min_arch=(8, 0),
            max_head_dim=80,
            head_dim_multiple=8,
            max_length=64,
        ),
        _TORCH,
    ),
    "varlen_attention": (
        Implementation(
            "flash_attn_3",
            ("cuda",),
            needs="flash_attn_interface",
            dtypes=HALF,
            min_arch=(9, 0),
            max_head_dim=256,
            head_dim_multiple=8,
        ),
        Implementation(
            "flash_attn",
            ("cuda",),
            needs="flash_attn",
            dtypes=HALF,
            min_arch=(8, 0),
            max_head_dim=256,
            head_dim_multiple=8,
        ),
        # Pre-releases (flash_attn/cute/interface.py): Hopper and later, heads of up to 128 on every one of them.
        Implementation(
            "flash_attn_4",
            ("cuda",),
            needs=FLASH_ATTN_4,
            dtypes=HALF,
            min_arch=(9, 0),
            max_head_dim=128,
            head_dim_multiple=8,
        ),
        Implementation(
            "torch_varlen",
            ("cuda",),
            needs="torch.nn.attention.varlen",
            dtypes=HALF,
            min_arch=(8, 0),
            max_head_dim=256,
            head_dim_multiple=8,
        ),
        _TORCH,
    ),
    "dynamic_padding": (Implementation("triton", ("cuda",), ("musa", "cpu"), "triton"), _TORCH),
    "linear_cross_entropy": (
        Implementation("liger", ("cuda",), ("cpu",), "liger_kernel.ops.vocab_parallel_cross_entropy"),
        _TORCH,
    ),
    "rms_norm": (Implementation("liger", ("cuda",), ("cpu",), "liger_kernel.ops.rms_norm"), _TORCH),
    "swiglu": (Implementation("liger", ("cuda",), ("cpu",), "liger_kernel.ops.swiglu"), _TORCH),
}
"""For every operator its implementations, best first; the last runs everywhere."""


@dataclass(frozen=True)
class Choice:
    """The implementation that is taken, and why those before it are not."""

    operator: str
    name: str
    declined: Mapping[str, str] = field(default_factory=dict)


def choose(operator: str, device: torch.device, call: Call, request: str = "auto") -> str:
    """Name of the implementation for a call; the first choice of each kind is logged.

    Args:
        request: `auto`, or the name of one implementation.

    Raises:
        ValueError: the operator or the implementation is not known, or the one asked for cannot run here.
    """
    return _constant_choice(operator, device.type, call.dtype, call.head_dim, call.longest, request)


@torch.compiler.assume_constant_result
def _constant_choice(operator: str, device_type: str, dtype: torch.dtype, head_dim: int, longest: int, request: str):
    # Plain arguments, so that torch.compile can ask while it traces; the answer belongs to the traced shapes.
    return _chosen(operator, get_platform(device_type), Call(dtype, head_dim, longest), request).name


@cache
def _chosen(operator: str, platform: Platform, call: Call, request: str) -> Choice:
    choice = select(operator, platform, call, request)
    why = "; ".join(f"not {name}: {reason}" for name, reason in choice.declined.items())
    logger.info("%s on %s in %s runs %s (%s)", operator, platform.name, call.dtype, choice.name, why or "best one")
    return choice


def select(operator: str, platform: Platform, call: Call, request: str = "auto") -> Choice:
    """As `choose`, for a given platform and with the reasons."""
    rows = _rows(operator)
    if request != "auto":
        row = _named(operator, rows, request)
        reason = why_not(row, platform, call, requested=True)
        if reason is not None:
            raise ValueError(f"{operator}={request} was asked for, but {reason}; use auto or another implementation")
        return Choice(operator, request)
    declined: dict[str, str] = {}
    for row in rows:
        reason = why_not(row, platform, call, requested=False)
        if reason is None:
            return Choice(operator, row.name, declined)
        declined[row.name] = reason
    reasons = "; ".join(f"{name}: {reason}" for name, reason in declined.items())
    raise ValueError(f"{operator} has no implementation for this call ({reasons})")


def check_dtype(name: str, x: torch.Tensor) -> None:
    """Raises ValueError unless an argument has a type that operators compute."""
    known = (*FLOATS, torch.float64)
    if x.dtype not in known:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in known)
        raise ValueError(f"{name} is {x.dtype}; it must be one of {names}")


def why_not(row: Implementation, platform: Platform, call: Call, *, requested: bool) -> str | None:
    """The first reason why an implementation cannot take a call; None = it can."""
    allowed = row.default_on + (row.on_request if requested else ())
    # A plug-in platform is served by what runs everywhere.
    if platform.stands_for not in allowed and row.default_on != EVERYWHERE:
        asked = platform.stands_for in row.on_request
        return f"on {platform.name} it has to be asked for" if asked else f"it does not run on {platform.name}"
    return _missing(row, platform) or _unfit(row, call)


def _missing(row: Implementation, platform: Platform) -> str | None:
    if row.min_arch > (0, 0) and platform.stands_for == "cuda":
        arch = platform_arch(platform)
        if arch < row.min_arch:
            return f"it needs compute capability {_dotted(row.min_arch)}, this device has {_dotted(arch)}"
    if row.needs == "triton":
        return why_no_triton(platform)
    if row.needs.startswith("liger_kernel"):
        # Its operators are Triton kernels.
        return why_no_triton(platform) if module_exists(row.needs) else f"{row.needs} is not installed"
    if row.needs == "flash_attn":
        return None if platform.offers(row.needs) else f"platform {platform.name} does not offer {row.needs}"
    if row.needs == FLASH_ATTN_4:
        return None if distribution_exists(row.needs) else f"{row.needs} is not installed"
    if row.needs and not module_exists(row.needs):
        return f"{row.needs} is not installed"
    return None


def _unfit(row: Implementation, call: Call) -> str | None:
    if call.dtype not in row.dtypes:
        return f"it does not compute {call.dtype}"
    if row.max_head_dim and call.head_dim > row.max_head_dim:
        return f"head_dim {call.head_dim} is above {row.max_head_dim}"
    if call.head_dim % row.head_dim_multiple:
        return f"head_dim {call.head_dim} is not a multiple of {row.head_dim_multiple}"
    if row.max_length and call.longest > row.max_length:
        return f"a sequence of {call.longest} rows is above {row.max_length}"
    return None


def distribution_exists(name: str) -> bool:
    """Whether a package of that name on PyPI is installed."""
    return any(metadata.distributions(name=name))


def platform_arch(platform: Platform) -> tuple[int, int]:
    """Compute capability of the current device of an accelerator platform."""
    runtime: Any = getattr(torch, platform.device_type)
    return tuple(runtime.get_device_capability())  # type: ignore[return-value]


def kernel_table(platform: Platform, call: Call) -> list[tuple[str, str, str]]:
    """For every operator and implementation `(operator, implementation, "taken" or why not)`, in table order."""
    lines = []
    for operator, rows in TABLE.items():
        taken = select(operator, platform, call).name
        for row in rows:
            reason = why_not(row, platform, call, requested=False)
            state = "taken" if row.name == taken else reason or f"{taken} comes first"
            lines.append((operator, row.name, state))
    return lines


def _rows(operator: str) -> tuple[Implementation, ...]:
    if operator not in TABLE:
        raise ValueError(f"there is no operator '{operator}'; there are {', '.join(TABLE)}")
    return TABLE[operator]


def _named(operator: str, rows: tuple[Implementation, ...], name: str) -> Implementation:
    for row in rows:
        if row.name == name:
            return row
    known = ", ".join(["auto", *(row.name for row in rows)])
    raise ValueError(f"{operator} has no implementation '{name}'; use {known}")


def _dotted(arch: tuple[int, int]) -> str:
    return f"{arch[0]}.{arch[1]}"
