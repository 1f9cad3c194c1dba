"""A device that is not there: torch.cuda or torch.musa answers from a data sheet, and what waits for it is counted."""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.cuda.random
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from megatron_rb.rehearsal.sites import site
from megatron_rb.rehearsal.stand_ins import StandIns

DEVICES = 8
"""Of a machine."""
STATE_BYTES = 16
"""Of a generator of CUDA: seed and offset."""


@dataclass(frozen=True)
class DataSheet:
    """What torch.cuda says of the rehearsed device."""

    name: str
    capability: tuple[int, int]
    memory: int
    """Bytes."""
    multiprocessors: int


class Waits:
    """How often the host waits for the device, by kind and line."""

    def __init__(self) -> None:
        self.seen: Counter[tuple[str, str]] = Counter()

    def note(self, kind: str) -> None:
        self.seen[kind, site()] += 1

    def restart(self) -> None:
        self.seen = Counter()


class RehearsedStream:
    """A stream with nothing in it."""

    def __init__(self, waits: Waits, device_type: str = "cuda") -> None:
        self._waits = waits
        self.device = torch.device(device_type, 0)
        self.cuda_stream = self.stream_id = self.device_index = 0
        self.device_type = 1

    def synchronize(self) -> None:
        self._waits.note("stream.synchronize")

    def wait_stream(self, stream: Any) -> None:
        """Orders work on the device; the host goes on."""

    def wait_event(self, event: Any) -> None:
        """As `wait_stream`."""

    def record_event(self, event: Any = None) -> Any:
        return event or RehearsedEvent(self._waits)

    def query(self) -> bool:
        return True

    def __enter__(self) -> RehearsedStream:
        return self

    def __exit__(self, *error: object) -> None:
        pass


class RehearsedEvent:
    """An event that has always happened."""

    def __init__(self, waits: Waits) -> None:
        self._waits = waits

    def record(self, stream: Any = None) -> None:
        pass

    def wait(self, stream: Any = None) -> None:
        """Orders work on the device; the host goes on."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self._waits.note("event.synchronize")

    def elapsed_time(self, end: Any) -> float:
        return 1.0


class _Generator:
    """A generator of the device: there are no random numbers in a rehearsal."""

    def __init__(self) -> None:
        self.state = torch.zeros(STATE_BYTES, dtype=torch.uint8)

    def get_state(self) -> torch.Tensor:
        return self.state.clone()

    def set_state(self, state: torch.Tensor) -> None:
        pass

    def manual_seed(self, seed: int) -> None:
        pass

    def clone_state(self) -> _Generator:
        return self

    graphsafe_get_state = get_state
    graphsafe_set_state = set_state


class _Pinned:
    """Storages of page-locked memory, as a rehearsal takes them: by name, none is locked."""

    def __init__(self) -> None:
        self.keys: set[int] = set()

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        self.keys.add(storage._cdata)
        weakref.finalize(storage, self.keys.discard, storage._cdata)
        return tensor.view(tensor.shape)  # another object, as pinning makes

    def holds(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self.keys


def answers_of(sheet: DataSheet, waits: Waits, device_type: str) -> dict[str, Any]:
    """What the runtime of a device says, by the names that the vendors' modules in torch have for it."""
    streams = _stream_answers(waits, device_type)
    return {**_device_answers(sheet), **_memory_answers(sheet), **streams, **_random_answers()}


def stand_in_for_cuda(stand_ins: StandIns, sheet: DataSheet, waits: Waits) -> Callable[[torch.Tensor], bool]:
    """Let torch.cuda answer as on the device of a data sheet.

    Returns:
        Whether a CPU tensor is in page-locked memory.
    """
    answers = answers_of(sheet, waits, "cuda")
    for name, value in answers.items():
        stand_ins.set(torch.cuda, name, value)
    for name in ("get_rng_state", "set_rng_state", "manual_seed"):
        stand_ins.set(torch.cuda.random, name, answers[name])
    stand_ins.set(torch.cuda.random, "current_device", answers["current_device"])
    stand_ins.set(torch.version, "cuda", "12.9")
    return stand_in_for_tensors(stand_ins)


def stand_in_for_tensors(stand_ins: StandIns) -> Callable[[torch.Tensor], bool]:
    """Let tensors of the host be page-locked by name, and those of the device be made without one.

    Returns:
        Whether a CPU tensor is in page-locked memory.
    """
    pinned = _Pinned()
    stand_ins.set(torch.Tensor, "record_stream", lambda tensor, stream: None)
    stand_ins.set(torch.Tensor, "pin_memory", lambda tensor, *_, **__: pinned.pin(tensor))
    stand_ins.set(torch.Tensor, "is_pinned", lambda tensor, *_, **__: pinned.holds(tensor))
    # Says "is there a device to start?", which is so by `is_available` and must not be done.
    stand_ins.set(FakeTensorMode, "avoid_device_init", property(lambda mode: True))
    stand_ins.set(FakeTensor, "pin_memory", lambda tensor, *_, **__: tensor)
    return pinned.holds


def _device_answers(sheet: DataSheet) -> dict[str, Any]:
    properties = SimpleNamespace(
        name=sheet.name,
        major=sheet.capability[0],
        minor=sheet.capability[1],
        total_memory=sheet.memory,
        multi_processor_count=sheet.multiprocessors,
        warp_size=32,
        max_threads_per_multi_processor=2048,
        regs_per_multiprocessor=65536,
        shared_memory_per_block_optin=227 * 1024,
        uuid="",
    )
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "init": lambda: None,
        "device_count": lambda: DEVICES,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_capability": lambda device=None: sheet.capability,
        "get_device_name": lambda device=None: sheet.name,
        "get_device_properties": lambda device=None: properties,
        "is_bf16_supported": lambda including_emulation=True: True,
        "device": lambda device: contextlib.nullcontext(),
        "device_of": lambda tensor: contextlib.nullcontext(),
        "nccl": SimpleNamespace(version=lambda: (2, 27, 5)),
        "nvtx": SimpleNamespace(
            range=lambda *_, **__: contextlib.nullcontext(),
            range_push=lambda *_, **__: 0,
            range_pop=lambda *_, **__: 0,
            mark=lambda *_, **__: None,
        ),
    }


def _memory_answers(sheet: DataSheet) -> dict[str, Any]:
    return {
        "empty_cache": lambda: None,
        "mem_get_info": lambda device=None: (sheet.memory, sheet.memory),
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "memory_reserved": lambda device=None: 0,
        "max_memory_reserved": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "memory_stats": lambda device=None: Counter(),
    }


def _stream_answers(waits: Waits, device_type: str) -> dict[str, Any]:
    # Types, as torch's own are: libraries write them into annotations and ask for their instances.
    class Stream(RehearsedStream):
        def __init__(self, *_: Any, **__: Any) -> None:
            super().__init__(waits, device_type)

    class Event(RehearsedEvent):
        def __init__(self, *_: Any, **__: Any) -> None:
            super().__init__(waits)

    stream = Stream()
    return {
        "synchronize": lambda device=None: waits.note(f"{device_type}.synchronize"),
        "Stream": Stream,
        "Event": Event,
        "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream,
        "set_stream": lambda stream: None,
        "stream": lambda stream: contextlib.nullcontext(),
        "is_current_stream_capturing": lambda: False,
    }


def _random_answers() -> dict[str, Any]:
    generator = _Generator()
    return {
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device="cuda": generator.get_state(),
        "set_rng_state": lambda state, device="cuda": None,
        "default_generators": (generator,) * DEVICES,
    }
