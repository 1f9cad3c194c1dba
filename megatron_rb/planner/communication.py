"""Time of the messages of a step: tensor- and context-parallel collectives, pipeline boundaries, data-parallel
reduction."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from megatron_rb.planner.device import Device, Link
from megatron_rb.planner.sizes import ModelSizes
from megatron_rb.planner.work import Part, Shards, gathered_values
from megatron_rb.planner.workload import MicroBatches

HIDDEN_GRADIENT_SHARE = 0.5
"""Part of the tensor-parallel messages of the backward pass that runs beside the weight gradients."""


@dataclass(frozen=True)
class Grid:
    """Degrees, and where ranks are: tensor parallel closest together, then context, data and pipeline parallel."""

    tp_size: int
    cp_size: int
    dp_size: int
    pp_size: int
    devices_per_node: int

    @property
    def copies(self) -> int:
        """Ranks that hold the same weights, and sum their gradients."""
        return self.cp_size * self.dp_size

    def tp_link(self, device: Device) -> Link:
        return device.inside_node if self.tp_size <= self.devices_per_node else device.between_nodes

    def cp_link(self, device: Device) -> Link:
        """What one context-parallel group has."""
        return self._link_of(device, self.cp_size)

    def dp_link(self, device: Device) -> Link:
        """What the ranks with the same weights have."""
        return self._link_of(device, self.copies)

    def _link_of(self, device: Device, members: int) -> Link:
        """For a group whose neighbours are tp_size ranks apart; those on one machine each bring their own adapter."""
        if self.tp_size * members <= self.devices_per_node:
            return device.inside_node
        here = max(1, self.devices_per_node // self.tp_size)
        bandwidth = min(device.inside_node.bandwidth, here * device.between_nodes.bandwidth)
        return Link(bandwidth, device.between_nodes.latency)

    def pipeline_link(self, device: Device, slice_index: int) -> Link:
        """Between the pipeline ranks of slice `slice_index` and the next."""
        stride = self.tp_size * self.copies
        sender, receiver = (number % self.pp_size * stride for number in (slice_index, slice_index + 1))
        same = sender // self.devices_per_node == receiver // self.devices_per_node and stride < self.devices_per_node
        return device.inside_node if same else device.between_nodes


def gather_seconds(members: int, total_bytes: np.ndarray | float, link: Link, share: float) -> np.ndarray | float:
    """An all-gather or a reduce-scatter whose full tensor has `total_bytes`; an all-reduce is one of each."""
    if members == 1:
        return 0.0 * total_bytes
    hops = math.ceil(math.log2(members))
    return (members - 1) / members * total_bytes / (link.bandwidth * share) + hops * link.latency


def tensor_parallel_seconds(
    model: ModelSizes, shards: Shards, batches: MicroBatches, device: Device, grid: Grid
) -> dict[Part, tuple[np.ndarray, np.ndarray]]:
    """Messages of each part in the forward and in the backward pass."""
    link, share, tp = grid.tp_link(device), device.efficiency.link, shards.tp_size

    def pair(rows: np.ndarray, width: int) -> np.ndarray:
        return np.asarray(2 * gather_seconds(tp, rows * float(width * shards.itemsize), link, share))

    patches = pair(batches.patches, model.vision.hidden_size)
    tokens = pair(batches.tokens, model.text.hidden_size)
    merged = pair(batches.patches / model.vision.merge_unit, model.text.hidden_size)
    zero, exposed = 0.0 * patches, 1 - HIDDEN_GRADIENT_SHARE
    # A layer has two pairs of collectives; with sequence parallelism its backward pass gathers the inputs once more.
    again = 1.5 if shards.sequence_parallel else 1.0
    layer = {part: (2 * patches, 2 * patches * again * exposed) for part in (Part.WINDOW_LAYER, Part.FULL_LAYER)}
    spread = 0.5 if shards.sequence_parallel else 0.0
    return layer | {
        Part.PATCH_EMBED: (zero, spread * patches),
        Part.DEEPSTACK: (merged, zero),
        Part.MERGER: (merged + spread * patches, spread * patches),
        Part.EMBEDDING: (tokens, spread * tokens),
        Part.DECODER: (2 * tokens, 2 * tokens * again * exposed),
        Part.HEAD: (spread * tokens, tokens),
    }


def context_parallel_seconds(
    model: ModelSizes, shards: Shards, batches: MicroBatches, device: Device, grid: Grid
) -> dict[Part, tuple[np.ndarray, np.ndarray]]:
    """Messages in the forward and in the backward pass, and the copies around them.

    Keys and values are gathered before the attention of every decoder layer, and their gradients scattered; visual
    rows, DeepStack features too, once each on their way into the language model. Nothing hides them.

    Args:
        batches: what one rank has.
    """
    if shards.cp_size == 1:
        return {}
    link, cp = grid.cp_link(device), shards.cp_size
    bandwidth = device.memory_bandwidth * device.efficiency.memory

    def seconds(rows: np.ndarray, width: float, copies: float) -> np.ndarray:
        """Of rows of the whole micro-batch; each copy is read or written once."""
        total = rows * width * float(shards.itemsize)
        return np.asarray(gather_seconds(cp, total, link, device.efficiency.link)) + copies * total / bandwidth

    tokens, width = batches.tokens * cp, gathered_values(model.text, shards)
    rows = batches.patches / model.vision.merge_unit * cp * (1 + len(model.vision.deepstack_layers))
    visual = seconds(rows, model.text.hidden_size, 0.0)
    # Ahead the rows are put in order, back zeros are made and the gradients added to them.
    return {
        Part.DECODER: (seconds(tokens, width, 2.0), seconds(tokens, width, 4.0)),
        Part.EMBEDDING: (visual, visual),
    }


def boundary_bytes(model: ModelSizes, shards: Shards, batches: MicroBatches) -> np.ndarray:
    """Bytes that cross a cut in front of each block, `[blocks + 1, ...]`; nothing at the two ends.

    Flow of the stages: patches until the merger, then merged tokens, then tokens, and beside them the DeepStack
    features that no decoder layer has used yet.
    """
    vision, text, size = model.vision, model.text, shards.itemsize
    merged = batches.patches / vision.merge_unit * text.hidden_size * size
    patches = batches.patches * float(vision.hidden_size * size) / shards.rows_over
    tokens = batches.tokens * float(text.hidden_size * size) / shards.rows_over
    zero = 0.0 * merged
    crossing = [zero]
    waiting = 0
    for layer in range(vision.num_layers):
        crossing.append(patches + waiting * merged)  # in front of this layer
        waiting += layer in vision.deepstack_layers
    crossing.append(patches + waiting * merged)  # the merger
    crossing.append(merged + waiting * merged)  # the embedding
    for layer in range(text.num_layers + 1):  # the decoder layers and the head
        crossing.append(tokens + max(0, waiting - layer) * merged)
    return np.stack([*crossing, zero])


def data_parallel_seconds(
    parameters: float, gradient_bytes: int, weight_bytes: int, distributed: bool, device: Device, grid: Grid
) -> tuple[float, float]:
    """Time to reduce the gradients of a rank and to gather its weights again.

    Args:
        parameters: trained parameters of the rank.
    """
    link, share, copies = grid.dp_link(device), device.efficiency.link, grid.copies
    scatter = float(gather_seconds(copies, parameters * gradient_bytes, link, share))
    if not distributed:
        return 2 * scatter, 0.0
    return scatter, float(gather_seconds(copies, parameters * weight_bytes, link, share))
