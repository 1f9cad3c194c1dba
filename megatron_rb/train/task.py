"""The seam between the loop and what is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from megatron_rb.models.inputs import MicroBatch


@dataclass(frozen=True)
class StepBatches:
    """The micro-batches of this rank for one optimizer step."""

    micro_batches: Sequence[MicroBatch]
    epoch: int
    wait_seconds: float
    """Time the step waited for its data."""


class Task(Protocol):
    """What is trained: where batches come from, how they are run, how the model is judged."""

    def next_step(self) -> StepBatches:
        """The batches of the next step; the state then counts them as consumed."""
        ...

    def run(self, batches: Sequence[MicroBatch]) -> list[dict[str, torch.Tensor]]:
        """Forward and backward over the micro-batches; sums per micro-batch on ranks with the head, else nothing."""
        ...

    def evaluate(self) -> dict[str, float]:
        """Judge the model as it is now; equal on all ranks; empty when there is nothing to evaluate on."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...
