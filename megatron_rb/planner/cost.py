"""Time of every part of the model, forward and backward, for given micro-batches on one rank."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_rb.planner.calibration import Calibration
from megatron_rb.planner.communication import Grid, context_parallel_seconds, tensor_parallel_seconds
from megatron_rb.planner.device import Device
from megatron_rb.planner.sizes import ModelSizes
from megatron_rb.planner.trained import Frozen
from megatron_rb.planner.work import (
    PARTS,
    BlockWork,
    Part,
    Shards,
    forward_work,
    parameters,
    part_counts,
)
from megatron_rb.planner.workload import MicroBatches

ATTENTION_BACKWARD = 2.5
"""Matrix products of attention's backward pass over those of its forward pass: five for two."""


@dataclass(frozen=True)
class Pricing:
    """What a rate depends on."""

    device: Device
    dtype: str
    calibration: Calibration | None = None

    @property
    def itemsize(self) -> int:
        return 2 if self.dtype == "bf16" else 4

    @property
    def mode(self) -> str:
        """`nominal` or `calibrated`, as every prediction says."""
        return "calibrated" if self.calibration is not None else "nominal"


def nominal_seconds(
    work: BlockWork, device: Device, dtype: str, passes: tuple[float, float, float] = (1, 1, 1)
) -> np.ndarray:
    """Time of some work by the figures of the device.

    Args:
        passes: how often matrix products, attention and memory traffic of the work are done.
    """
    rate, efficiency = device.peak(dtype), device.efficiency
    products, attention, memory = passes
    # share(work) = best * work / (work + half), hence time = (work + half) / (peak * best).
    matmul = (work.matmul + work.matmuls * efficiency.matmul_half * (work.matmul > 0)) / (rate * efficiency.matmul)
    slow_start = (work.attended + efficiency.attention_half) / work.attended
    attended = work.attention * slow_start / (rate * efficiency.attention)
    moved = work.bytes / (device.memory_bandwidth * efficiency.memory)
    seconds = products * matmul + attention * attended + memory * moved
    return seconds + max(products, memory) * work.operators * efficiency.operator_seconds


def part_seconds(
    model: ModelSizes, shards: Shards, batches: MicroBatches, pricing: Pricing, grid: Grid, frozen: Frozen
) -> tuple[np.ndarray, np.ndarray]:
    """Forward and backward time of every part, `[parts, ...]`, tensor- and context-parallel messages included.

    Args:
        batches: what one rank has.
    """
    works, sizes = forward_work(model, shards, batches), parameters(model, shards.tp_size)
    messages = tensor_parallel_seconds(model, shards, batches, pricing.device, grid)
    for part, (ahead, back) in context_parallel_seconds(model, shards, batches, pricing.device, grid).items():
        messages[part] = messages[part][0] + ahead, messages[part][1] + back
    forward, backward = [], []
    for part in PARTS:
        ahead, back = compute_seconds(part, works[part], pricing, frozen, sizes[part])
        forward.append(ahead + messages[part][0])
        backward.append((back + messages[part][1]) * bool(frozen.trains(part) or frozen.passes_gradient(part)))
    return np.stack(forward), np.stack(backward)


def compute_seconds(
    part: Part, work: BlockWork, pricing: Pricing, frozen: Frozen, num_parameters: int
) -> tuple[np.ndarray, np.ndarray]:
    """Forward and backward time of a part without messages.

    Args:
        num_parameters: of the part; every backward pass adds their gradients to the fp32 gradient buffer.
    """
    trains = frozen.trains(part)
    products = float(trains) + float(frozen.passes_gradient(part))
    # The loss computes its gradients in the forward pass; its backward pass only scales them.
    now, later = (
        ((1 + products, 1.0, 2.0), (0.0, 0.0, 0.2))
        if part is Part.HEAD
        else ((1.0, 1.0, 1.0), (products, ATTENTION_BACKWARD, 2.0))
    )
    ahead = nominal_seconds(work, pricing.device, pricing.dtype, now)
    back = nominal_seconds(work, pricing.device, pricing.dtype, later)
    bandwidth = pricing.device.memory_bandwidth * pricing.device.efficiency.memory
    back = back + trains * num_parameters * (pricing.itemsize + 8) / bandwidth
    if pricing.calibration is None:
        return ahead, back
    correct = pricing.calibration.correct
    return correct(part.name, "forward", ahead), correct(part.name, "backward", back)


def optimizer_seconds(parameters: float, copies: int, distributed: bool, pricing: Pricing, kept: int = 2) -> float:
    """Time of gradient norm, update and clearing of gradients on a rank.

    Args:
        parameters: trained parameters of the rank.
        copies: ranks that hold them, and share the update when it is distributed.
        kept: fp32 numbers that the optimizer keeps of each parameter; AdamW two moments.
    """
    bandwidth = pricing.device.memory_bandwidth * pricing.device.efficiency.memory
    shard = parameters / (copies if distributed else 1)
    # Update: gradient, main weight and state in, the last two and the weight out, all but the weight in fp32.
    moved = shard * (4 * (1 + 2 * (1 + kept)) + 4 + pricing.itemsize) + parameters * 2 * 4
    seconds = moved / bandwidth
    if pricing.calibration is None:
        return seconds
    return float(pricing.calibration.correct("OPTIMIZER", "forward", np.array(seconds)))


def model_flops(model: ModelSizes, batches: MicroBatches, frozen: Frozen) -> np.ndarray:
    """FLOPs that forward and backward pass need at least, ViT included: no padding, no recompute, nothing for frozen
    weights. Attention counts three times its forward pass, as MFU is usually defined.
    """
    works = forward_work(model, Shards(1, False, 2), batches)
    counts = part_counts(model).sum(axis=0)
    total = np.zeros_like(batches.tokens, dtype=np.float64)
    for part, count in zip(PARTS, counts, strict=True):
        trains, passes = frozen.trains(part), frozen.passes_gradient(part)
        total = total + count * works[part].matmul * (1 + trains + passes)
        total = total + count * works[part].attention * (1 + 2 * (trains or passes))
    return total
