"""Whether a run fits into its devices by the planner's forecast, and which recompute makes it fit."""

from __future__ import annotations

import dataclasses

from megatron_rb.app.forecast import stage_forecast
from megatron_rb.config.derive import Derived
from megatron_rb.config.schema import Config, RecomputeConfig
from megatron_rb.layout import Kind, PipelineLayout
from megatron_rb.planner.device import Device, load_device
from megatron_rb.planner.memory import StageMemory
from megatron_rb.shapes.balance import default_layout
from megatron_rb.shapes.shape import RoboBrainShape

GIGABYTE = 1e9
HEADROOM = 0.1
"""Share of a device's memory that a proposal leaves free."""


def device_of_run(config: Config) -> Device | None:
    """The device that is named, or the smallest that the recipe is made for; None = nothing is known."""
    if config.planner.device:
        return load_device(config.planner.device)
    known = [load_device(name) for name in config.recipe.devices]
    known = [device for device in known if config.platform.name in ("auto", device.platform)]
    return min(known, key=lambda device: device.memory, default=None)


def check_fits(config: Config, derived: Derived, shape: RoboBrainShape) -> None:
    """Refuse a run whose forecast is over the memory of its devices, unless it is told not to look.

    Raises:
        ValueError: names the stage, what it needs, and what would fit.
    """
    for text in over_memory(config, derived, shape) if config.planner.check_memory else []:
        raise ValueError(
            f"{text}; planner.device names another device, planner.check_memory=false starts it all the same"
        )


def over_memory(config: Config, derived: Derived, shape: RoboBrainShape) -> list[str]:
    """A sentence when the forecast is over the memory of the devices; nothing when it fits, or they are not known."""
    device = device_of_run(config)
    if device is None:
        return []
    stages = stage_forecast(config, derived, shape, device.platform, device.reserved_memory)
    worst = max(range(len(stages)), key=lambda number: stages[number].total)
    memory = config.planner.max_memory or device.memory
    if stages[worst].total <= memory:
        return []
    return [
        f"pipeline rank {worst} would need {stages[worst].total / GIGABYTE:.0f} GB of the {memory / GIGABYTE:.0f} GB "
        f"of a {device.name} (a forecast for micro-batches of {config.data.seq_length} tokens and "
        f"{config.data.max_patches} patches); {_way_out(config, derived, shape, device)}"
    ]


def _way_out(config: Config, derived: Derived, shape: RoboBrainShape, device: Device) -> str:
    found = fitting_recompute(config, derived, shape, device)
    if found is None:
        return "no recompute makes it fit, so raise tp_size or pp_size, or lower data.max_patches (rb plan searches)"
    vision, language = (",".join(map(str, values)) for values in (found.vision_per_slice, found.language_per_slice))
    return f"it fits with model.recompute.vision_per_slice=[{vision}] model.recompute.language_per_slice=[{language}]"


def fitting_recompute(
    config: Config, derived: Derived, shape: RoboBrainShape, device: Device, headroom: float = HEADROOM
) -> RecomputeConfig | None:
    """The fewest recomputed layers with which every stage fits, those of the ViT first; None = there are none.

    A vision layer gives back more memory for the time its second pass takes than a decoder layer.
    """
    layout = derived.layout or default_layout(shape, derived.pp_size)
    memory = (config.planner.max_memory or device.memory) * (1 - headroom)
    steps = [_most(layout, rank) for rank in range(layout.pp_size)]

    def needed(chosen: list[int]) -> list[StageMemory]:
        changed = dataclasses.replace(
            config, model=dataclasses.replace(config.model, recompute=_spread(layout, chosen))
        )
        return stage_forecast(changed, derived, shape, device.platform, device.reserved_memory)

    if any(stage.total > memory for stage in needed(steps)):
        return None
    low, high = [0] * layout.pp_size, list(steps)
    while low != high:
        middle = [(a + b) // 2 for a, b in zip(low, high, strict=True)]
        for rank, stage in enumerate(needed(middle)):
            if low[rank] < high[rank]:
                low[rank], high[rank] = (
                    (low[rank], middle[rank]) if stage.total <= memory else (middle[rank] + 1, high[rank])
                )
    return _spread(layout, high)


def _most(layout: PipelineLayout, rank: int) -> int:
    """Layers of the fullest slice of a rank; each of its slices recomputes as many."""
    return max(_layers(layout, part.index)[0] + _layers(layout, part.index)[1] for part in layout.slices_of_rank(rank))


def _layers(layout: PipelineLayout, number: int) -> tuple[int, int]:
    part = layout.slice(number)
    return len(part.layers(Kind.VISION)), len(part.layers(Kind.DECODER))


def _spread(layout: PipelineLayout, chosen: list[int]) -> RecomputeConfig:
    """So many layers of every slice of a rank, its vision layers first."""
    vision, language = [], []
    for number in range(layout.num_slices):
        layers = _layers(layout, number)
        wanted = chosen[number % layout.pp_size]
        vision.append(min(wanted, layers[0]))
        language.append(min(max(0, wanted - layers[0]), layers[1]))
    return RecomputeConfig(vision_per_slice=vision, language_per_slice=language)
