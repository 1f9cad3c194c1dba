"""Which samples come next: a permutation per epoch whose whole state is three integers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class SamplerState:
    seed: int
    epoch: int = 0
    position: int = 0
    """Samples of this epoch that are consumed."""


class Sampler:
    """Order of `num_samples` samples; the same state gives the same samples on every machine and for every layout."""

    def __init__(self, num_samples: int, shuffle: bool) -> None:
        if num_samples < 1:
            raise ValueError("there is no sample to draw from; check data.train and the ledger of refused samples")
        self.num_samples = num_samples
        self.shuffle = shuffle
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """Sample numbers of one epoch, int64 `[num_samples]`."""
        if (seed, epoch) not in self._orders:
            # Only the latest is kept: a step asks for one epoch, or for one after the other.
            self._orders = {(seed, epoch): self._draw(seed, epoch)}
        return self._orders[seed, epoch]

    def _draw(self, seed: int, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.num_samples)
        # Sorting raw bits: numpy keeps the bit stream of PCG64 stable over its releases, but not `permutation`.
        return np.argsort(np.random.PCG64([seed, epoch]).random_raw(self.num_samples), kind="stable")

    def take(self, state: SamplerState, count: int) -> tuple[np.ndarray, SamplerState]:
        """The next `count` samples, over the end of an epoch if need be, and the state after them."""
        parts: list[np.ndarray] = []
        while count > 0:
            part = self.order(state.seed, state.epoch)[state.position : state.position + count]
            parts.append(part)
            count -= len(part)
            state = replace(state, position=state.position + len(part))
            if state.position == self.num_samples:
                state = SamplerState(state.seed, state.epoch + 1, 0)
        return np.concatenate(parts), state

    def advance(self, state: SamplerState, count: int) -> SamplerState:
        """The state after `count` more samples, without drawing them."""
        epochs, position = divmod(state.position + count, self.num_samples)
        return SamplerState(state.seed, state.epoch + epochs, position)
