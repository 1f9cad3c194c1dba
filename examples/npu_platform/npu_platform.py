"""A platform of one's own for megatron-rb: a device whose runtime is the module `torch.npu`."""

from __future__ import annotations

import torch

from megatron_rb.platform.accelerator import AcceleratorPlatform
from megatron_rb.platform.base import ProbeResult, Use


class NpuPlatform(AcceleratorPlatform):
    """Devices, random states, memory, streams and events come from `AcceleratorPlatform`, by way of `torch.npu`."""

    name = "npu"
    vendor = "Example"
    device_type = "npu"
    collective_backend = "cpu:gloo,npu:hccl"
    visible_devices_env = "NPU_VISIBLE_DEVICES"

    def probe(self) -> ProbeResult:
        """Asked in every process, also where there is no such device: look, do not start anything."""
        if not hasattr(torch, "npu"):
            return ProbeResult(False, "torch has no npu device; install the vendor's extension")
        count = self.runtime.device_count()
        return ProbeResult(count > 0, f"{count} npu device(s)")

    def why_not(self, dtype: torch.dtype, use: Use = "compute") -> str | None:
        if use == "collective" and not dtype.is_floating_point:
            return None
        low = (torch.float16, torch.bfloat16)
        known = low if use == "autocast" else (*low, torch.float32)
        return None if dtype in known else "the device has no units for it"

    def allow_tf32(self, allowed: bool) -> None:
        pass  # no TF32: fp32 products are fp32

    def _offers(self, capability: str) -> bool:
        return False  # no Transformer Engine, Triton, flash-attn or fused Adam for it: torch's implementations run
