"""The NVIDIA platform."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import torch

from megatron_rb.platform.accelerator import AcceleratorPlatform, nvidia_apex_exists
from megatron_rb.platform.base import ProbeResult, Use, module_exists, package_exists

HALF = (torch.float16, torch.bfloat16)
FIRST_BF16_ARCH = (8, 0)


class CudaPlatform(AcceleratorPlatform):
    name = "cuda"
    vendor = "NVIDIA"
    device_type = "cuda"
    collective_backend = "cpu:gloo,cuda:nccl"
    visible_devices_env = "CUDA_VISIBLE_DEVICES"

    def probe(self) -> ProbeResult:
        # A musa build may answer torch.cuda calls with its own devices, so the build is asked before the runtime.
        if getattr(torch.version, "musa", None) is not None:
            return ProbeResult(False, "this torch is built for musa")
        if torch.version.cuda is None:
            return ProbeResult(False, "this torch is built without CUDA")
        if not torch.cuda.is_available():
            return ProbeResult(False, "no NVIDIA device is visible")
        return ProbeResult(True, f"{torch.cuda.device_count()} NVIDIA device(s)")

    def why_not(self, dtype: torch.dtype, use: Use = "compute") -> str | None:
        if dtype is torch.bfloat16 and use != "collective" and self.arch < FIRST_BF16_ARCH:
            return f"it needs compute capability 8.0, this device has {self.arch[0]}.{self.arch[1]}"
        if use == "collective" and not dtype.is_floating_point:
            return None
        known = HALF if use == "autocast" else (*HALF, torch.float32, torch.float64)
        return (
            None
            if dtype in known
            else f"only {', '.join(str(d).removeprefix('torch.') for d in known)} are known to work"
        )

    def allow_tf32(self, allowed: bool) -> None:
        torch.backends.cuda.matmul.allow_tf32 = allowed
        torch.backends.cudnn.allow_tf32 = allowed

    def named_range(self, name: str) -> AbstractContextManager[Any]:
        stack = ExitStack()
        stack.enter_context(torch.profiler.record_function(name))
        stack.enter_context(torch.cuda.nvtx.range(name))
        return stack

    def profiler_activities(self) -> list[torch.profiler.ProfilerActivity]:
        return [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]

    def record_memory_history(self, recorded: bool) -> None:
        torch.cuda.memory._record_memory_history(enabled="all" if recorded else None)

    def write_memory_snapshot(self, path: Path) -> None:
        torch.cuda.memory._dump_snapshot(str(path))

    def _offers(self, capability: str) -> bool:
        match capability:
            case "te":
                return module_exists("transformer_engine_torch") or module_exists("transformer_engine.pytorch")
            case "triton":
                return module_exists("triton")
            case "flash_attn":
                return package_exists("flash_attn")  # flash-attn 4 alone leaves a folder of this name
            case "fused_adam":
                return self._offers("te") or nvidia_apex_exists()
            case "pinned_memory" | "memory_history":
                return True
        return False

    def info(self) -> dict[str, Any]:
        nccl = ".".join(str(part) for part in torch.cuda.nccl.version())
        return super().info() | {"cuda": torch.version.cuda, "nccl": nccl}
