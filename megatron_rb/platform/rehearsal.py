"""The platforms of rehearsals: all that CUDA or musa are, on tensors that have shapes and no values."""

from __future__ import annotations

import torch

from megatron_rb.platform.base import ProbeResult
from megatron_rb.platform.cuda import CudaPlatform
from megatron_rb.platform.musa import MusaPlatform

REHEARSED = "_megatron_rb_rehearsed"
"""An attribute of torch.cuda, or torch.musa, while it is answered by stand-ins."""


class RehearsalPlatform(CudaPlatform):
    """CUDA as `rb rehearse` stands in for it; the process has no device."""

    name = "cuda-rehearsal"

    @property
    def stands_for(self) -> str:
        return CudaPlatform.name

    def probe(self) -> ProbeResult:
        if hasattr(torch.cuda, REHEARSED):
            return ProbeResult(True, "a rehearsal")
        return ProbeResult(False, "it is that of `rb rehearse` and computes nothing; train with platform.name=cuda")

    def device_identity(self) -> str:
        """Nothing: all ranks are rehearsed by a few processes."""
        return ""


class MusaRehearsalPlatform(MusaPlatform):
    """musa as `rb rehearse` stands in for it; the process has no device."""

    name = "musa-rehearsal"

    @property
    def stands_for(self) -> str:
        return MusaPlatform.name

    def probe(self) -> ProbeResult:
        if hasattr(getattr(torch, "musa", None), REHEARSED):
            return ProbeResult(True, "a rehearsal")
        return ProbeResult(False, "it is that of `rb rehearse` and computes nothing; train with platform.name=musa")

    def device_identity(self) -> str:
        """Nothing: all ranks are rehearsed by a few processes."""
        return ""
