"""What MFU is a share of: the figure of a data sheet where the device is a known one, else a measured product."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from megatron_rb.planner.device import Peak, published_peak
from megatron_rb.platform import Platform
from megatron_rb.platform.dtypes import DTYPES

CPU_SIDE, SIDE = 1024, 8192
"""Of the square matrices whose product is measured."""


def known_peak(platform: Platform, dtype: str, stated_tflops: float = 0.0) -> Peak | None:
    """As stated, else as published; None where nothing is known."""
    if stated_tflops:
        return Peak(stated_tflops * 1e12, "stated")
    return published_peak(str(platform.info()["device"]), dtype)


def peak_of(platform: Platform, dtype: str, stated_tflops: float = 0.0) -> Peak:
    """As stated, else as published, else measured; every rank calls this."""
    return known_peak(platform, dtype, stated_tflops) or _measured(platform, dtype)


def _measured(platform: Platform, dtype: str) -> Peak:
    """The fastest of some matrix products, all ranks at the same time, mean over the ranks."""
    side = CPU_SIDE if platform.name == "cpu" else SIDE
    a = torch.randn(side, side, dtype=DTYPES[dtype], device=platform.current_device())
    dist.barrier()
    best = min(_seconds(a, platform) for _ in range(8))
    rate = torch.tensor(2 * side**3 / best, dtype=torch.float64)
    dist.all_reduce(rate)
    mean = float(rate) / dist.get_world_size()
    return Peak(mean, f"measured: product of {side} x {side} matrices, {dtype}")


def _seconds(a: torch.Tensor, platform: Platform) -> float:
    platform.synchronize()
    start = time.perf_counter()
    a @ a
    platform.synchronize()
    return time.perf_counter() - start
