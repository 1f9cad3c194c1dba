"""The interface of a platform: the small set of device questions the rest of the code asks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from megatron_rb.platform.move import move_module

CAPABILITIES = ("te", "triton", "flash_attn", "fused_adam", "pinned_memory", "memory_history")
"""What `Platform.offers` answers: Transformer Engine, Triton, flash-attn, a vendor's fused Adam, page-locked memory, a
history of allocations."""
Use = Literal["compute", "collective", "autocast"]
"""What a dtype is wanted for: matrix products, collectives between processes, the low precision of autocast."""


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
    vendor: ClassVar[str]
    """Who makes the device."""
    device_type: ClassVar[str]
    """Type of its `torch.device`."""
    collective_backend: ClassVar[str]
    """Backend string for `torch.distributed.init_process_group`; always serves CPU tensors too."""
    collective_environment: ClassVar[Mapping[str, str]] = {}
    """Variables that the backends read when the first group is made; what the user has set stays."""
    visible_devices_env: ClassVar[str | None] = None
    """Environment variable that limits the devices a process sees."""

    @property
    def stands_for(self) -> str:
        """Name of the platform whose kernels and limits hold here: its own, but for stand-ins of another one."""
        return self.name

    @property
    def device_backend(self) -> str | None:
        """Backend string for groups in which only tensors on the device travel; None = that of the world serves both.

        With the device's type before the name: torch_musa's `mccl` alone would be looked for under letters.
        """
        parts = self.collective_backend.split(",")
        return next((part for part in parts if part.startswith(f"{self.device_type}:")), None)

    @abstractmethod
    def probe(self) -> ProbeResult:
        """Look for the device without creating a context on it; never raises."""

    @abstractmethod
    def current_device(self) -> torch.device:
        """The device of this process, with its index where the device type has one."""

    @abstractmethod
    def set_device(self, local_rank: int) -> None:
        """Bind this process to the device of its local rank, or to the only one it was given.

        Raises:
            ValueError: there is no such device.
        """

    def device_identity(self) -> str:
        """What tells the current device from all others of its machine; empty = nothing is known that does."""
        return ""

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
    def why_not(self, dtype: torch.dtype, use: Use = "compute") -> str | None:
        """Why `dtype` cannot be used here for a purpose; None = it runs natively."""

    @abstractmethod
    def new_event(self) -> Any:
        """An event with the methods of `torch.Event` that measures time."""

    @abstractmethod
    def new_stream(self) -> Any:
        """A stream with the methods of `torch.Stream`."""

    @abstractmethod
    def current_stream(self) -> Any: ...

    @abstractmethod
    def use_stream(self, stream: Any) -> AbstractContextManager[Any]:
        """Queue the work of a block on a stream."""

    @abstractmethod
    def allow_tf32(self, allowed: bool) -> None:
        """Whether fp32 matrix products may round their inputs to TF32. Vendors' defaults differ, so say it."""

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

    def supports(self, dtype: torch.dtype, use: Use = "compute") -> bool:
        """Whether `dtype` can be used here for a purpose."""
        return self.why_not(dtype, use) is None

    def require(self, dtype: torch.dtype, *uses: Use) -> None:
        """Raise ValueError with the reason and the way out when `dtype` cannot be used for one of the purposes."""
        for use in uses:
            reason = self.why_not(dtype, use)
            if reason is not None:
                raise ValueError(f"{_short(dtype)} for {use} on {self.name}: {reason}; use model.dtype=fp32")

    def named_range(self, name: str) -> AbstractContextManager[Any]:
        """A block of code as profilers show it; vendors add their own mark (NVTX) to torch's."""
        return torch.profiler.record_function(name)

    def profiler_activities(self) -> list[torch.profiler.ProfilerActivity]:
        """What torch.profiler records here."""
        return [torch.profiler.ProfilerActivity.CPU]

    def record_memory_history(self, recorded: bool) -> None:
        """Begin or stop to keep who allocated device memory; only where `memory_history` is offered."""
        raise ValueError(f"platform {self.name} keeps no history of its memory")

    def write_memory_snapshot(self, path: Path) -> None:
        """Write the history as a pickle for pytorch.org/memory_viz."""
        raise ValueError(f"platform {self.name} keeps no history of its memory")

    def autocast(self, dtype: torch.dtype, enabled: bool = True) -> torch.autocast:
        """torch's mixed precision on this device."""
        if enabled:
            self.require(dtype, "autocast")
        return torch.autocast(self.device_type, dtype=dtype, enabled=enabled)

    def move_module(self, module: torch.nn.Module) -> torch.nn.Module:
        """Move a module to the current device; its parameters stay the same objects with their attributes and ties."""
        return move_module(module, self.current_device())

    def device(self, index: int | None = None) -> torch.device:
        """A device of this platform; without an index, the current one."""
        if index is None:
            return self.current_device()
        return torch.device(self.device_type, index)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def package_exists(name: str) -> bool:
    """Whether `name` is a package with code of its own, and not only a folder in which another one lies."""
    try:
        spec = find_spec(name)
    except (ImportError, ValueError):
        return False
    return spec is not None and spec.origin is not None


def module_exists(name: str) -> bool:
    """Whether `name` can be imported, found out without importing it (parents of a dotted name are imported)."""
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):
        return False
