"""What MFU is a share of: the figure of a data sheet where the device is a known one, else a measured product."""

from __future__ import annotations

import re
import time

import torch
import torch.distributed as dist

from megatron_rb.bench.train.result import Peak
from megatron_rb.models.build import DTYPES
from megatron_rb.planner.device import device_names, load_device
from megatron_rb.platform import Platform

SLOWER_FORMS = {"PCIE", "NVL"}
"""Words in the names of devices that share a number with a faster one; their data sheets say less."""
CPU_SIDE, SIDE = 1024, 8192
"""Of the square matrices whose product is measured."""


def peak_of(platform: Platform, dtype: str, stated_tflops: float) -> Peak:
    """As stated, else as published, else measured; every rank calls this."""
    if stated_tflops:
        return Peak(stated_tflops * 1e12, "stated with --peak-tflops")
    return published_peak(str(platform.info()["device"]), dtype) or _measured(platform, dtype)


def published_peak(device: str, dtype: str) -> Peak | None:
    """The peak of a device by the name its runtime gives it; None when no shipped description is of it."""
    words = set(re.split(r"[\W_]+", device.upper()))
    for name in device_names():
        known = load_device(name)
        number = name.split("_")[-1].upper()
        if number in words and number != "CPU" and not words & SLOWER_FORMS and dtype in known.peak_flops:
            return Peak(known.peak(dtype), f"{known.name}, {dtype}, from conf/device/{name}.yaml")
    return None


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
