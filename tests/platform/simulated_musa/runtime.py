"""The module `torch.<name>` of the simulated device, and its generator of 16 bytes."""

from __future__ import annotations

import hashlib
import struct
import types
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import psutil
import torch

from megatron_rb.platform.host_streams import HostEvent, HostStream

SEED_AND_OFFSET = struct.Struct("<Qq")
OFFSET_PER_CALL = 4
S4000 = (2, 2)


class Runtime(types.ModuleType):
    """What the vendor's module offers, as far as this project and torch itself use it; work is done when it returns.

    `_initialized`, by which torch decides whether recomputation keeps the device's random state, is left out: a vendor
    need not have it.
    """

    def __init__(self, name: str, devices: int) -> None:
        super().__init__(f"torch.{name}")
        self._type = name
        self._devices, self._arch, self._current = devices, S4000, 0
        self._states = [(0, 0)] * devices

    def is_available(self) -> bool:
        return self._devices > 0

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def _lazy_init(self) -> None: ...

    def device_count(self) -> int:
        return self._devices

    def current_device(self) -> int:
        return self._current

    def set_device(self, device: Any) -> None:
        self._current = self._index(device)

    @contextmanager
    def device(self, device: Any) -> Iterator[None]:
        before, self._current = self._current, self._index(device)
        try:
            yield
        finally:
            self._current = before

    def Event(self, enable_timing: bool = False) -> HostEvent:
        return HostEvent(enable_timing)

    def Stream(self, device: Any = None) -> HostStream:
        return HostStream()

    def current_stream(self, device: Any = None) -> HostStream:
        return HostStream()

    default_stream = current_stream

    def stream(self, stream: HostStream) -> AbstractContextManager[HostStream]:
        return nullcontext(stream)

    def synchronize(self, device: Any = None) -> None: ...

    def get_device_capability(self, device: Any = None) -> tuple[int, int]:
        return self._arch

    def get_device_name(self, device: Any = None) -> str:
        return f"simulated {self._type}"

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def manual_seed(self, seed: int) -> None:
        self._states[self._current] = (seed % 2**64, 0)

    def manual_seed_all(self, seed: int) -> None:
        self._states = [(seed % 2**64, 0)] * self._devices

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.frombuffer(bytearray(SEED_AND_OFFSET.pack(*self._states[self._index(device)])), dtype=torch.uint8)

    def set_rng_state(self, new_state: torch.Tensor, device: Any = None) -> None:
        if new_state.numel() != SEED_AND_OFFSET.size:
            raise RuntimeError("RNG state is wrong size")
        self._states[self._index(device)] = SEED_AND_OFFSET.unpack(bytes(new_state.tolist()))

    def next_seed(self) -> int:
        """Seed of the next random operator on the current device."""
        seed, offset = self._states[self._current]
        self._states[self._current] = (seed, offset + OFFSET_PER_CALL)
        return int.from_bytes(hashlib.sha256(SEED_AND_OFFSET.pack(seed, offset)).digest()[:7], "little")

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        memory = psutil.virtual_memory()
        return memory.available, memory.total

    def memory_allocated(self, device: Any = None) -> int:
        return psutil.Process().memory_info().rss

    memory_reserved = max_memory_allocated = max_memory_reserved = memory_allocated

    def reset_peak_memory_stats(self, device: Any = None) -> None: ...

    def empty_cache(self) -> None: ...

    def _index(self, device: Any) -> int:
        index = device if isinstance(device, int) or device is None else torch.device(device).index
        index = self._current if index is None else index
        if not 0 <= index < self._devices:
            raise RuntimeError(f"invalid device ordinal {index} of {self._devices}")
        return index
