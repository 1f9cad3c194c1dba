"""The Moore Threads platform (torch_musa)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron_rb.platform.accelerator import AcceleratorPlatform
from megatron_rb.platform.base import ProbeResult, Use, module_exists

HALF = (torch.float16, torch.bfloat16)
FIRST_BF16_ARCH = (2, 2)
"""mp_22 is the first architecture with native bf16, collectives in it, and a flash attention."""


class MusaPlatform(AcceleratorPlatform):
    name = "musa"
    vendor = "Moore Threads"
    device_type = "musa"
    collective_backend = "cpu:gloo,musa:mccl"
    visible_devices_env = "MUSA_VISIBLE_DEVICES"

    def probe(self) -> ProbeResult:
        # Never through torch.cuda: vendor stacks answer it on behalf of their own device.
        if not module_exists("torch_musa"):
            return ProbeResult(False, "torch_musa is not installed")
        if getattr(torch.version, "musa", None) is None:
            return ProbeResult(False, "torch_musa is installed, but this torch is not its patched build")
        if not hasattr(torch, "musa"):
            return ProbeResult(False, "torch_musa was not loaded with torch; unset TORCH_DEVICE_BACKEND_AUTOLOAD")
        count = self.runtime.device_count()
        return ProbeResult(count > 0, f"{count} musa device(s)")

    def why_not(self, dtype: torch.dtype, use: Use = "compute") -> str | None:
        if use == "collective" and "mccl" not in dist.Backend.backend_list:
            return "this torch_musa is built without MCCL"
        if use == "collective" and not dtype.is_floating_point:
            return None
        if dtype is torch.bfloat16 and self.arch < FIRST_BF16_ARCH:
            return f"it needs mp_22 (S4000) or newer, this device is mp_{self.arch[0]}{self.arch[1]}"
        if use == "autocast":
            return None if dtype in HALF else "autocast computes in float16 or bfloat16"
        if dtype is torch.float64:
            return "fp64 is emulated, or computed in fp32 where TORCH_USE_MUSA_DOUBLE_CAST is set"
        return None if dtype in (*HALF, torch.float32) else "only float16, bfloat16 and float32 are known to work"

    def allow_tf32(self, allowed: bool) -> None:
        # mudnn's switch covers matrix products and convolutions.
        backends: Any = torch.backends
        if hasattr(backends, "mudnn"):
            backends.mudnn.allow_tf32 = allowed

    def _offers(self, capability: str) -> bool:
        match capability:
            case "te" | "fused_adam":
                return module_exists("transformer_engine.musa")
            case "triton":
                return module_exists("triton")
            case "pinned_memory":
                return True
        return False

    def info(self) -> dict[str, Any]:
        return super().info() | {"musa": getattr(torch.version, "musa", None)}
