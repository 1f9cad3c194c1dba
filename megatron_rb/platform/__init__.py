"""What differs between cuda, musa and cpu: devices, random state, memory, collectives, and the megatron-core shims."""

from megatron_rb.platform.base import CAPABILITIES, MemoryStats, Platform, ProbeResult
from megatron_rb.platform.registry import available_platforms, get_platform, use_platform

__all__ = [
    "CAPABILITIES",
    "MemoryStats",
    "Platform",
    "ProbeResult",
    "available_platforms",
    "get_platform",
    "use_platform",
]
