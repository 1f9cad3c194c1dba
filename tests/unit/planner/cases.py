"""Models, devices and histograms for the tests of the planner."""

from __future__ import annotations

import numpy as np

from megatron_rb.data.packing import Budget, plan_step
from megatron_rb.planner.cost import Pricing
from megatron_rb.planner.device import Device, load_device
from megatron_rb.planner.histogram import Histogram, histogram_of
from megatron_rb.planner.task import PlanTask
from megatron_rb.planner.workload import MicroBatchSampler
from megatron_rb.shapes.published import CONFIGS
from megatron_rb.shapes.shape import RoboBrainShape, shape_from_dict


def published(name: str) -> RoboBrainShape:
    return shape_from_dict(CONFIGS[name])


def tiny(vision_layers: int = 3, text_layers: int = 4, family: str = "RoboBrain2.0-7B") -> RoboBrainShape:
    """A published model with few and narrow layers."""
    raw = dict(CONFIGS[family])
    text = dict(raw.get("text_config", raw))
    text |= {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": text_layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 1024,
        "head_dim": 128,
    }
    vision = dict(raw["vision_config"]) | {"depth": vision_layers, "out_hidden_size": 256}
    if "fullatt_block_indexes" in vision:
        vision["fullatt_block_indexes"] = [vision_layers - 1]
    if "deepstack_visual_indexes" in vision:
        vision["deepstack_visual_indexes"] = [0, 1]
    raw = (raw | {"text_config": text} if "text_config" in raw else raw | text) | {"vision_config": vision}
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return shape_from_dict(raw | {name: 1000 + number for number, name in enumerate(names)})


def mixed_histogram(samples: int = 2000, longest: int = 4096) -> Histogram:
    """Conversations with none to six pictures of two sizes."""
    draw = np.random.default_rng(1)
    text = np.minimum(draw.lognormal(5, 1, samples).astype(int) + 8, longest // 4)
    frame = draw.choice([256, 576], samples)
    patches = frame * draw.integers(0, 7, samples)
    return histogram_of(text, patches, np.where(patches > 0, frame, 0), "made up for a test")


def packed(sizes: np.ndarray, tokens: int, patches: int, ranks: int, multiple: int) -> list[list[list[int]]]:
    return plan_step(sizes, Budget(tokens, patches), ranks, multiple)


def task(
    shape: RoboBrainShape,
    gpus: int = 8,
    *,
    device: Device | str = "h200",
    global_batch_size: int = 64,
    seq_length: int = 4096,
    max_patches: int = 16384,
    histogram: Histogram | None = None,
    **asked: int,
) -> PlanTask:
    known = load_device(device) if isinstance(device, str) else device
    sampler = MicroBatchSampler(histogram or mixed_histogram(), shape.vision.merge_unit, global_batch_size, packed)
    return PlanTask(shape, Pricing(known, "bf16"), gpus, sampler, seq_length, max_patches, asked=asked)
