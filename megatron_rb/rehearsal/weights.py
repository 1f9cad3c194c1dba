"""First weights of a rehearsal: tensors without values in place of random numbers and of files."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megatron_rb.models.build import fill_weights, full_shapes
from megatron_rb.models.stage import RoboBrainStage
from megatron_rb.parallel.session import Session
from megatron_rb.rehearsal.stand_ins import StandIns
from megatron_rb.rehearsal.watch import Watch
from megatron_rb.train import build


def stand_in_for_weights(stand_ins: StandIns, watch: Watch) -> None:
    """Random weights are not drawn, and the base weights of adapters not read."""

    def random_weights(stages: list[RoboBrainStage], seed: int) -> Callable[[str], torch.Tensor]:
        shapes = full_shapes(stages)
        return lambda name: watch.without_values(shapes[name], torch.float32)

    def fill_base(stages: list[RoboBrainStage], session: Session, folder: str) -> str:
        fill_weights(stages, session.mesh, random_weights(stages, seed=0))
        return "rehearsed"

    stand_ins.set(build, "random_weights", random_weights)
    stand_ins.set(build, "fill_base", fill_base)
    stand_ins.set(build, "check_base", lambda settings, shape, base: None)
    stand_ins.set(build, "check_first_weights", lambda init, mesh: None)
