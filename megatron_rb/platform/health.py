"""What this machine has and how fast it is: driver, devices, memory, disk, a port, libraries, a matrix product."""

from __future__ import annotations

import os
import platform as python_platform
import shutil
import socket
import subprocess
import time
from importlib import metadata
from typing import Any

import psutil
import torch

from megatron_rb.config.open_files import raise_open_files
from megatron_rb.platform.base import Platform
from megatron_rb.platform.mcore_version import found_version, version_fault

FLASH_ATTN = ("flash-attn", "flash-attn-3", "flash-attn-4")
LIBRARIES = ("torch", "megatron-core", "transformers", "transformer-engine", *FLASH_ATTN, "triton", "torch_musa")
QUERIES = {
    "cuda": (
        "nvidia-smi",
        "--query-gpu=name,driver_version,clocks.sm,clocks.max.sm,memory.total,memory.used",
        "--format=csv,noheader",
    ),
    "musa": ("mthreads-gmi", "-q"),
}
MATMUL_SIZE = {"cpu": 1024}
REPEATS = 5


def machine_report(platform: Platform, folder: str, port: int) -> dict[str, Any]:
    """Facts about this machine, JSON-able; nothing here needs another one.

    Args:
        folder: whose disk is looked at.
        port: tried out when it is not 0.
    """
    memory, disk = psutil.virtual_memory(), shutil.disk_usage(folder)
    return {
        "host": socket.gethostname(),
        "kernel": python_platform.release(),
        "platform": platform.name,
        "devices": platform.device_count(),
        "driver": _driver(platform.name),
        "open_files": raise_open_files(),
        "lazy_gloo": os.environ.get("TORCH_GLOO_LAZY_INIT", "0") not in ("0", ""),
        "cores": len(os.sched_getaffinity(0)),
        "memory_free_gib": round(memory.available / 2**30, 1),
        "memory_gib": round(memory.total / 2**30, 1),
        "disk_free_gib": round(disk.free / 2**30, 1),
        "clock": time.time(),
        "port": _port(port),
        "libraries": {name: version for name in LIBRARIES if (version := version_of(name))},
        "faults": [fault for fault in (version_fault(),) if fault],
        "matmul_tflops": matmul_tflops(platform),
    }


def matmul_tflops(platform: Platform) -> float:
    """Rate of a square matrix product in the precision that training uses; the best of some tries."""
    size = MATMUL_SIZE.get(platform.device_type, 8192)
    half = platform.device_type != "cpu" and platform.supports(torch.bfloat16)
    dtype = torch.bfloat16 if half else torch.float32
    left = torch.ones(size, size, dtype=dtype, device=platform.current_device())
    best = float("inf")
    for _ in range(REPEATS):
        start, end = platform.new_event(), platform.new_event()
        start.record()
        left @ left
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / 1e3)
    return round(2 * size**3 / best / 1e12, 4)


def _driver(name: str) -> str:
    command = QUERIES.get(name)
    if command is None or shutil.which(command[0]) is None:
        return ""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except subprocess.TimeoutExpired:
        return f"{command[0]} gave no answer within 20 s"


def version_of(name: str) -> str:
    """The version of an installed package, and of megatron-core what an import finds; empty = it is not installed."""
    if name == "megatron-core":
        return found_version()
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _port(port: int) -> str:
    if not port:
        return "not asked"
    try:
        with socket.socket() as probe:
            probe.bind(("", port))
    except OSError as error:
        return f"{port}: {error.strerror}"
    return f"{port}: free"
