"""The CPU platform: gloo collectives, host memory, no streams."""

from __future__ import annotations

import contextlib
import os
import platform as host
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import psutil
import torch

from megatron_rb.platform.base import MemoryStats, Platform, ProbeResult, Use
from megatron_rb.platform.host_streams import HostEvent, HostStream

CLEAR_REFS, RESET_PEAK = Path("/proc/self/clear_refs"), "5"
"""Linux: writing this value sets the peak of the resident memory to its present size (proc(5))."""


class CpuPlatform(Platform):
    name = "cpu"
    vendor = "host"
    device_type = "cpu"
    collective_backend = "gloo"

    def probe(self) -> ProbeResult:
        return ProbeResult(True, "always present")

    def current_device(self) -> torch.device:
        return torch.device("cpu")

    def set_device(self, local_rank: int) -> None:
        pass

    def device_count(self) -> int:
        return 1

    def synchronize(self) -> None:
        pass

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def get_rng_state(self) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor) -> None:
        expected = torch.get_rng_state().numel()
        if state.numel() != expected:
            raise ValueError(
                f"a CPU random state has {expected} bytes, this one has {state.numel()}: seed anew instead"
            )
        torch.set_rng_state(state)

    def memory(self) -> MemoryStats:
        resident = psutil.Process().memory_info().rss
        machine = psutil.virtual_memory()
        peak = _peak_resident()
        return MemoryStats(allocated=resident, peak_allocated=peak, free=machine.available, total=machine.total)

    def reset_peak_memory(self) -> None:
        with contextlib.suppress(OSError):  # not Linux, or a container that forbids it: the peak then counts from start
            CLEAR_REFS.write_text(RESET_PEAK)

    def empty_cache(self) -> None:
        pass

    def why_not(self, dtype: torch.dtype, use: Use = "compute") -> str | None:
        if use == "collective" and not dtype.is_floating_point:
            return None
        if dtype is torch.bfloat16 or (dtype in (torch.float32, torch.float64) and use != "autocast"):
            return None
        # torch has kernels for fp16, but no loss scaling is meant to run on a CPU.
        return "torch's CPU kernels compute in fp32, fp64 and bf16"

    def new_event(self) -> HostEvent:
        return HostEvent(enable_timing=True)

    def new_stream(self) -> HostStream:
        return HostStream()

    def current_stream(self) -> HostStream:
        return HostStream()

    def use_stream(self, stream: HostStream) -> AbstractContextManager[HostStream]:
        return nullcontext(stream)

    def allow_tf32(self, allowed: bool) -> None:
        pass  # fp32 stays fp32

    def _offers(self, capability: str) -> bool:
        return False

    def info(self) -> dict[str, Any]:
        return {
            "platform": self.name,
            "device": _model_name() or host.processor() or host.machine(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
        }


def _peak_resident() -> int | None:
    """Bytes; None where the system does not tell."""
    line = _first_line(Path("/proc/self/status"), "VmHWM")
    return int(line.split()[0]) * 1024 if line else None


def _model_name() -> str:
    return _first_line(Path("/proc/cpuinfo"), "model name")


def _first_line(path: Path, key: str) -> str:
    """What stands behind `key:` in its first line; empty without the file or the key."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")
