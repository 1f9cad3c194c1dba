"""The NVIDIA platform."""

from __future__ import annotations

from typing import Any

import torch

from megatron_rb.platform.accelerator import AcceleratorPlatform, nvidia_apex_exists
from megatron_rb.platform.base import ProbeResult, module_exists


class CudaPlatform(AcceleratorPlatform):
    name = "cuda"
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

    def supports(self, dtype: torch.dtype) -> bool:
        if dtype is torch.bfloat16:
            return torch.cuda.get_device_capability() >= (8, 0)
        return dtype in (torch.float16, torch.float32, torch.float64)

    def _offers(self, capability: str) -> bool:
        match capability:
            case "te":
                return module_exists("transformer_engine_torch") or module_exists("transformer_engine.pytorch")
            case "triton":
                return module_exists("triton")
            case "flash_attn":
                return module_exists("flash_attn")
            case "fused_adam":
                return self._offers("te") or nvidia_apex_exists()
            case "grad_accum_fusion":
                return module_exists("fused_weight_gradient_mlp_cuda")
        return True

    def info(self) -> dict[str, Any]:
        nccl = ".".join(str(part) for part in torch.cuda.nccl.version())
        return super().info() | {"cuda": torch.version.cuda, "nccl": nccl}
