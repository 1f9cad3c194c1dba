"""What cuda and musa share: both runtimes are a `torch.<device type>` module with the same functions."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import torch

from megatron_rb.platform.base import MemoryStats, Platform, module_exists

STEP_DEVICES = "SLURM_STEP_GPUS"
"""Set by Slurm for every task, whoever makes the devices; under cgroups the vendor's own variable is 0 in all."""


class AcceleratorPlatform(Platform):
    """A device whose runtime is the module `torch.<device_type>`."""

    # Every group has a gloo part for CPU tensors, which few of them ever use: without this each of them opens a socket
    # to all its members, about 3,000 in a process of 1,024.
    collective_environment = {"TORCH_GLOO_LAZY_INIT": "1"}

    @property
    def runtime(self) -> ModuleType:
        """The vendor's module in torch, e.g. `torch.cuda`."""
        return getattr(torch, self.device_type)

    def current_device(self) -> torch.device:
        return torch.device(self.device_type, self.runtime.current_device())

    def set_device(self, local_rank: int) -> None:
        count = self.device_count()
        # A task that sees one device may have been given it alone; `device_identity` tells whether it was.
        index = 0 if count == 1 and len(self._named_devices()) == 1 else local_rank
        if not 0 <= index < count:
            raise ValueError(
                f"local rank {local_rank} has no {self.name} device, this process sees {count}; "
                f"start at most {count} processes here or widen {self.visible_devices_env}"
            )
        self.runtime.set_device(index)

    def device_identity(self) -> str:
        named = ",".join(self._named_devices())
        if not named:
            return ""
        properties = getattr(self.runtime, "get_device_properties", lambda index: None)
        uuid = getattr(properties(self.runtime.current_device()), "uuid", "")
        return f"{uuid or self.name} {named} {self.runtime.current_device()}"

    def _named_devices(self) -> list[str]:
        """Devices that Slurm names for this task, by their numbers on the machine, else those of the variable."""
        names = os.environ.get(STEP_DEVICES) or os.environ.get(self.visible_devices_env or "", "")
        return [name.strip() for name in names.split(",") if name.strip()]

    def device_count(self) -> int:
        return self.runtime.device_count()

    def synchronize(self) -> None:
        self.runtime.synchronize()

    def seed(self, seed: int) -> None:
        self.runtime.manual_seed(seed)

    def get_rng_state(self) -> torch.Tensor:
        return self.runtime.get_rng_state()

    def set_rng_state(self, state: torch.Tensor) -> None:
        expected = self.runtime.get_rng_state().numel()
        if state.numel() != expected:
            raise ValueError(
                f"a {self.name} random state has {expected} bytes, this one has {state.numel()}: seed anew instead"
            )
        self.runtime.set_rng_state(state)

    def memory(self) -> MemoryStats:
        free, total = self.runtime.mem_get_info()
        return MemoryStats(
            allocated=self.runtime.memory_allocated(),
            reserved=self.runtime.memory_reserved(),
            peak_allocated=self.runtime.max_memory_allocated(),
            peak_reserved=self.runtime.max_memory_reserved(),
            free=free,
            total=total,
        )

    def reset_peak_memory(self) -> None:
        self.runtime.reset_peak_memory_stats()

    def empty_cache(self) -> None:
        self.runtime.empty_cache()

    def new_event(self) -> Any:
        return self.runtime.Event(enable_timing=True)

    def new_stream(self) -> Any:
        return self.runtime.Stream()

    def current_stream(self) -> Any:
        return self.runtime.current_stream()

    def use_stream(self, stream: Any) -> AbstractContextManager[Any]:
        return self.runtime.stream(stream)

    @property
    def arch(self) -> tuple[int, int]:
        """Architecture of the current device, as the vendor counts: (9, 0) = sm_90, (2, 2) = mp_22."""
        major, minor = self.runtime.get_device_capability()
        return major, minor

    def info(self) -> dict[str, Any]:
        return {
            "platform": self.name,
            "device": self.runtime.get_device_name(),
            "devices": self.device_count(),
            "capability": "{}.{}".format(*self.arch),
            "memory_bytes": self.runtime.mem_get_info()[1],
            "torch": torch.__version__,
        }


def nvidia_apex_exists() -> bool:
    """NVIDIA's apex, told by its CUDA extension: the package of that name on PyPI is another project."""
    return module_exists("amp_C") and module_exists("apex.optimizers")
