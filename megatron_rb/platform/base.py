"""The interface of a platform: the small set of device questions the rest of the code asks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar

import torch

CAPABILITIES = (
    "te",
    "triton",
    "flash_attn",
    "fused_adam",
    "grad_accum_fusion",
    "compile",
    "nvtx",
    "streams",
    "pinned_memory",
)
"""Names that `Platform.offers` answers."""


@dataclass(frozen=True)
class ProbeResult:
    """Whether a platform can be used on this machine, and why (not)."""

    available: bool
    reason: str


@dataclass(frozen=True)
class MemoryStats:
    """Bytes on the current device; None where the platform cannot know."""

    allocated: int | None = None
    reserved: int | None = None
    peak_allocated: int | None = None
    peak_reserved: int | None = None
    free: int | None = None
    total: int | None = None


class Platform(ABC):
    """One kind of device. Stateless: everything is asked from the vendor's runtime when it is needed."""

    name: ClassVar[str]
    device_type: ClassVar[str]
    collective_backend: ClassVar[str]
    """Backend string for `torch.distributed.init_process_group`; always serves CPU tensors too."""
    visible_devices_env: ClassVar[str | None] = None
    """Environment variable that limits the devices a process sees."""

    @abstractmethod
    def probe(self) -> ProbeResult:
        """Look for the device without creating a context on it; never raises."""

    @abstractmethod
    def current_device(self) -> torch.device:
        """The device of this process, with its index where the device type has one."""

    @abstractmethod
    def set_device(self, local_rank: int) -> None:
        """Bind this process to a device; raises ValueError when there is no such device."""

    @abstractmethod
    def device_count(self) -> int: ...

    @abstractmethod
    def synchronize(self) -> None:
        """Wait for all work queued on the current device."""

    @abstractmethod
    def seed(self, seed: int) -> None:
        """Seed the generator of the device."""

    @abstractmethod
    def get_rng_state(self) -> torch.Tensor:
        """State of the device's generator as a uint8 CPU tensor."""

    @abstractmethod
    def set_rng_state(self, state: torch.Tensor) -> None:
        """Inverse of get_rng_state; raises ValueError for the state of another platform."""

    @abstractmethod
    def memory(self) -> MemoryStats: ...

    @abstractmethod
    def reset_peak_memory(self) -> None: ...

    @abstractmethod
    def empty_cache(self) -> None:
        """Return cached blocks to the device."""

    @abstractmethod
    def supports(self, dtype: torch.dtype) -> bool:
        """Whether matrix products in `dtype` run natively."""

    @abstractmethod
    def info(self) -> dict[str, Any]:
        """JSON-able description of device and runtime for logs and checkpoints."""

    @abstractmethod
    def _offers(self, capability: str) -> bool: ...

    def offers(self, capability: str) -> bool:
        """Whether `capability` (one of CAPABILITIES) can be used here."""
        if capability not in CAPABILITIES:
            raise ValueError(f"unknown platform capability {capability!r}; known are {', '.join(CAPABILITIES)}")
        return self._offers(capability)

    def device(self, index: int | None = None) -> torch.device:
        """A device of this platform; without an index, the current one."""
        if index is None:
            return self.current_device()
        return torch.device(self.device_type, index)


def module_exists(name: str) -> bool:
    """Whether `name` can be imported, found out without importing it (parents of a dotted name are imported)."""
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):
        return False
