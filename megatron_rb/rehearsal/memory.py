"""Bytes that live on the rehearsed device: how many, at their peak, and which lines of the source hold them."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from megatron_rb.rehearsal.sites import site

ROUNDING = 512
"""Bytes that torch's caching allocator rounds sizes up to."""
STEADY_GROWTH = 1.002
"""A new picture of what lives is taken when the peak has grown by this factor; one per allocation would take long."""


@dataclass(frozen=True, eq=False)
class Allocation:
    """One allocation; equal to itself alone."""

    size: int
    """Bytes, rounded up as the allocator does."""
    site: str
    backward: bool
    """Allocated by autograd's own thread, outside of a forward pass."""


@dataclass
class MemoryPeak:
    """The largest number of live bytes since `DeviceMemory.restart`, and what it was made of."""

    size: int = 0
    blocks: list[Allocation] = field(default_factory=list)
    pictured: int = 0
    """Bytes when `blocks` was taken."""


class DeviceMemory:
    """Follows storages from their allocation to their end.

    What it cannot know: fragmentation, workspaces of libraries, buffers of NCCL, the context of the driver.
    """

    def __init__(self) -> None:
        self.live = 0
        self.blocks: dict[int, Allocation] = {}
        self.peak = MemoryPeak()

    def restart(self) -> None:
        """Begin to look for another peak."""
        self.peak = MemoryPeak()

    def note(self, tensor: torch.Tensor) -> None:
        """A tensor of the device has come out of an operation; its storage counts once."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.blocks:
            return
        size = -(-storage.nbytes() // ROUNDING) * ROUNDING
        node = torch._C._current_autograd_node()
        self.blocks[key] = Allocation(size, site(), node is not None)
        weakref.finalize(storage, self._drop, key)
        self.live += size
        self._raise_peak()

    def blocks_of(self, tensors: Iterable[torch.Tensor]) -> set[Allocation]:
        """The allocations of tensors that live."""
        keys = {tensor.untyped_storage()._cdata for tensor in tensors}
        return {self.blocks[key] for key in keys if key in self.blocks}

    def _raise_peak(self) -> None:
        if self.live <= self.peak.size:
            return
        self.peak.size = self.live
        if self.live >= STEADY_GROWTH * self.peak.pictured:
            self.peak.blocks, self.peak.pictured = list(self.blocks.values()), self.live

    def _drop(self, key: int) -> None:
        block = self.blocks.pop(key, None)
        if block is not None:
            self.live -= block.size


def by_site(blocks: Iterable[Allocation]) -> Counter[str]:
    """Bytes by the lines that allocated them."""
    held: Counter[str] = Counter()
    for block in blocks:
        held[block.site] += block.size
    return held
