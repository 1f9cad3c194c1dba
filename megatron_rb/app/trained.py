"""What a run trains, as the planner counts it."""

from __future__ import annotations

import dataclasses

from megatron_rb.config.schema import ModelConfig
from megatron_rb.planner.trained import Frozen
from megatron_rb.shapes.shape import RoboBrainShape


def trained_of(settings: ModelConfig, shape: RoboBrainShape) -> Frozen:
    """What of a model is trained.

    Raises:
        ValueError: nothing, or adapters do not fit the model.
    """
    if not settings.adapters:
        return Frozen(**dataclasses.asdict(settings.freeze))
    # It imports torch for its tables of weights, which the start of other runs does without.
    from megatron_rb.app.adapted import adapted_of

    return adapted_of(settings, shape)
