"""Moves whole storages to and from the simulated device, as `torch.save` and `torch.load` do."""

from __future__ import annotations

from typing import Any

import torch

from tests.platform.simulated_musa.memory import is_simulated


def teach_storages() -> None:
    """torch would ask an allocator in C++ that the simulated device does not have."""
    storage = torch.UntypedStorage
    plain = {name: getattr(storage, name) for name in ("to", "cpu", "copy_")}

    def to(self, *, device: Any, non_blocking: bool = False):
        device = torch.device(device)
        if not is_simulated(device) and not is_simulated(self):
            return plain["to"](self, device=device, non_blocking=non_blocking)
        return self if device == self.device else _bytes_of(self).to(device).untyped_storage()

    def cpu(self):
        return to(self, device="cpu") if is_simulated(self) else plain["cpu"](self)

    def copy_(self, source, non_blocking: Any = None):
        if not is_simulated(self) and not is_simulated(source):
            return plain["copy_"](self, source, non_blocking)
        _bytes_of(self).copy_(_bytes_of(source))
        return self

    storage.to, storage.cpu, storage.copy_ = to, cpu, copy_  # type: ignore[method-assign]


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    """The tensor of a storage's bytes."""
    empty = torch.empty(0, dtype=torch.uint8, device=storage.device)
    return empty.set_(storage, 0, (storage.nbytes(),), (1,))
