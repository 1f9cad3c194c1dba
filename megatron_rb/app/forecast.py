"""The planner's forecast of the memory of a run as its settings are."""

from __future__ import annotations

from megatron_rb.app.trained import trained_of
from megatron_rb.config.derive import Derived
from megatron_rb.config.optimizers import OPTIMIZERS
from megatron_rb.config.schema import Config, RecomputeConfig
from megatron_rb.planner.kept import operators_of
from megatron_rb.planner.memory import SliceRecompute, StageMemory, memory_model, stage_memory, state_bytes
from megatron_rb.planner.work import Shards
from megatron_rb.planner.workload import MicroBatchLimits
from megatron_rb.shapes.balance import default_layout
from megatron_rb.shapes.shape import RoboBrainShape

MANY_MICRO_BATCHES = 4
"""Of every stage: so many fill the pipeline."""
EVERY_LAYER = 10**6


def stage_forecast(
    config: Config, derived: Derived, shape: RoboBrainShape, platform: str, reserved: float, micro_batches: int = 0
) -> list[StageMemory]:
    """Predicted peak memory of every pipeline rank, for micro-batches that fill both budgets.

    Args:
        platform: whose kernels run.
        reserved: bytes that context and libraries take.
        micro_batches: of a step and copy; 0 = enough to fill the pipeline.
    """
    cp = derived.cp_size
    shards = Shards(derived.tp_size, derived.sequence_parallel, 2 if config.model.dtype == "bf16" else 4, cp)
    optimizer = OPTIMIZERS[config.optimizer.name]
    state = state_bytes(config.model.dtype, config.parallel.distributed_optimizer, cp * derived.dp_size, optimizer)
    largest = MicroBatchLimits(-(-config.data.seq_length // cp), -(-config.data.max_patches // cp))
    frozen = trained_of(config.model, shape)
    layout = derived.layout or default_layout(shape, derived.pp_size)
    operators = operators_of(config.kernels, platform)
    return stage_memory(
        memory_model(shape, shards, largest, state, frozen, reserved, operators),
        layout,
        recompute_of(config.model.recompute, layout.num_slices),
        micro_batches or layout.pp_size * MANY_MICRO_BATCHES,
    )


def recompute_of(settings: RecomputeConfig, num_slices: int) -> tuple[SliceRecompute, ...]:
    """What every slice recomputes, by the settings."""
    vision = settings.vision_per_slice or [settings.vision] * num_slices
    language = settings.language_per_slice or [settings.language] * num_slices
    return tuple(
        SliceRecompute(EVERY_LAYER if v < 0 else v, EVERY_LAYER if t < 0 else t)
        for v, t in zip(vision, language, strict=True)
    )
