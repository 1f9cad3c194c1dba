"""First weights of a rehearsal: tensors without values in place of random numbers and of files."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megatron_rb.models.build import full_shapes
from megatron_rb.models.stage import RoboBrainStage
from megatron_rb.rehearsal.stand_ins import StandIns
from megatron_rb.rehearsal.watch import Watch
from megatron_rb.train import build


def stand_in_for_weights(stand_ins: StandIns, watch: Watch) -> None:
    """Random weights are not drawn."""

    def random_weights(stages: list[RoboBrainStage], seed: int) -> Callable[[str], torch.Tensor]:
        shapes = full_shapes(stages)
        return lambda name: watch.without_values(shapes[name], torch.float32)

    stand_ins.set(build, "random_weights", random_weights)
