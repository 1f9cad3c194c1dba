"""The Moore Threads platform (torch_musa)."""

from __future__ import annotations

from typing import Any

import torch

from megatron_rb.platform.accelerator import AcceleratorPlatform
from megatron_rb.platform.base import ProbeResult, module_exists

FIRST_BF16_ARCH = (2, 2)
"""mp_22 is the first architecture with native bf16 and a flash attention."""


class MusaPlatform(AcceleratorPlatform):
    name = "musa"
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
            return ProbeResult(False, "torch_musa did not register itself with torch")
        count = self.runtime.device_count()
        return ProbeResult(count > 0, f"{count} musa device(s)")

    def supports(self, dtype: torch.dtype) -> bool:
        if dtype is torch.bfloat16:
            return self.runtime.get_device_capability() >= FIRST_BF16_ARCH
        return dtype in (torch.float16, torch.float32)

    def _offers(self, capability: str) -> bool:
        match capability:
            case "te" | "fused_adam":
                return module_exists("transformer_engine.musa")
            case "triton":
                return module_exists("triton")
            case "streams" | "pinned_memory":
                return True
        return False

    def info(self) -> dict[str, Any]:
        return super().info() | {"musa": getattr(torch.version, "musa", None)}
