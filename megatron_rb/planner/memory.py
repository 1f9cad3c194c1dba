"""Memory of a rank: weights, gradients, optimizer, activations in flight, logits, reserve.

Activations are what the layers of this stack keep for their backward pass (`model.layers=local`); Transformer Engine's
keep no more. They are counted for the largest micro-batch, since the first step is padded to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np

from megatron_rb.config.optimizers import FP32_BYTES, OptimizerTraits
from megatron_rb.layout import PipelineLayout
from megatron_rb.planner.kept import TORCH, Operators, changed_by_freezing, kept_bytes, working_bytes
from megatron_rb.planner.schedule import most_in_flight
from megatron_rb.planner.sizes import ModelSizes
from megatron_rb.planner.trained import Frozen
from megatron_rb.planner.work import PARTS, VISION_LAYERS, Part, Shards, parameters, part_counts
from megatron_rb.planner.workload import MicroBatchLimits

FRAGMENTATION = 0.04
"""Share of the tensors' memory that an allocator with reused block sizes leaves unusable: assumed."""


@dataclass(frozen=True)
class StateBytes:
    """Bytes of one parameter on a rank."""

    weight: float
    gradient: float
    optimizer: float


@dataclass(frozen=True)
class StageMemory:
    """Peak memory of one pipeline rank in bytes."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    """Kept for the backward pass, of all micro-batches in flight."""
    working: float
    """The layer being computed, logits and loss."""
    reserve: float
    """Context and libraries, and what fragmentation takes."""

    @property
    def total(self) -> float:
        return float(sum(vars(self).values()))

    def as_json(self) -> dict[str, int]:
        return {name: round(value) for name, value in asdict(self).items()} | {"total": round(self.total)}


@dataclass(frozen=True)
class SliceRecompute:
    """Layers of one slice, counted from its first, that are computed again in the backward pass."""

    vision: int = 0
    language: int = 0


@dataclass(frozen=True)
class MemoryModel:
    """Bytes of each part for one way to cut the tensors."""

    model: ModelSizes
    shards: Shards
    parameters: np.ndarray
    """`[parts]`"""
    trained: np.ndarray
    """`[parts]`: parameters with gradient and optimizer state."""
    kept: np.ndarray
    """`[parts]`: bytes kept for the backward pass of one micro-batch."""
    inputs: np.ndarray
    """`[parts]`: bytes kept when a layer is recomputed: its input."""
    working: np.ndarray
    """`[parts]`: bytes in use while the part is computed, beyond what is kept."""
    state: StateBytes
    reserved: float
    feature: float = 0.0
    """Bytes of a DeepStack feature that travels to a later stage."""

    def static(self, counts: np.ndarray, shared: np.ndarray | float = 0.0) -> tuple[np.ndarray, ...]:
        """Weights, gradients and optimizer of slices.

        Args:
            counts: parts in each slice, `[..., parts]`.
            shared: parameters that are counted twice, because head and embedding of the slice are one.
        """
        held = counts @ self.parameters - shared
        embedding = PARTS.index(Part.EMBEDDING)
        trained = counts @ self.trained - shared * (self.trained[embedding] / self.parameters[embedding])
        return held * self.state.weight, trained * self.state.gradient, trained * self.state.optimizer


def state_bytes(dtype: str, distributed: bool, copies: int, optimizer: OptimizerTraits) -> StateBytes:
    """megatron-core's DDP and an optimizer: bf16 has fp32 gradients and main weights, fp32 the optimizer's state alone.

    Args:
        copies: ranks with the same weights, data- and context-parallel ones.
    """
    over = copies if distributed else 1
    state = optimizer.state_bytes
    return StateBytes(2, 4, (FP32_BYTES + state) / over) if dtype == "bf16" else StateBytes(4, 4, state / over)


def memory_model(
    model: ModelSizes,
    shards: Shards,
    largest: MicroBatchLimits,
    state: StateBytes,
    frozen: Frozen,
    reserved: float,
    operators: Operators = TORCH,
) -> MemoryModel:
    """Bytes for micro-batches of which a rank has at most `largest` tokens and patches."""
    sizes = parameters(model, shards.tp_size)
    kept = kept_bytes(model, shards, largest, operators)
    rows = largest.patches / shards.rows_over, largest.tokens / shards.rows_over
    item = shards.itemsize
    inputs = {
        Part.WINDOW_LAYER: rows[0] * model.vision.hidden_size * item,
        Part.FULL_LAYER: rows[0] * model.vision.hidden_size * item,
        Part.DECODER: rows[1] * model.text.hidden_size * item,
    }
    idle = [not (frozen.trains(part) or frozen.passes_gradient(part)) for part in PARTS]
    factors = {part: frozen.factors(part) for part in PARTS}
    kept = {part: kept[part] + changed_by_freezing(model, shards, largest, part, frozen) for part in PARTS}
    held = [sizes[part] + (each.on_rank(shards.tp_size) if (each := factors[part]) else 0.0) for part in PARTS]
    return MemoryModel(
        model,
        shards,
        np.array(held, dtype=np.float64),
        np.array([frozen.trained(part, sizes[part], shards.tp_size) for part in PARTS], dtype=np.float64),
        np.array([0.0 if off else kept[part] for part, off in zip(PARTS, idle, strict=True)]),
        np.array([0.0 if off else inputs.get(part, kept[part]) for part, off in zip(PARTS, idle, strict=True)]),
        np.array(working_bytes(model, shards, largest, kept)),
        state,
        reserved,
        largest.patches / model.vision.merge_unit * model.text.hidden_size * item,
    )


def slice_counts(model: ModelSizes, layout: PipelineLayout) -> np.ndarray:
    """Parts of each slice of a layout, `[slices, parts]`."""
    prefix = np.concatenate([np.zeros((1, len(PARTS)), dtype=np.int64), part_counts(model).cumsum(axis=0)])
    ends = np.cumsum(layout.slice_lengths)
    return prefix[ends] - prefix[ends - layout.slice_lengths]


def shared_parameters(memory: MemoryModel, counts: np.ndarray) -> np.ndarray:
    """Parameters that embedding and head of a slice have in common, `[...]`."""
    embedding, head = PARTS.index(Part.EMBEDDING), PARTS.index(Part.HEAD)
    both = (counts[..., embedding] > 0) & (counts[..., head] > 0)
    return both * memory.parameters[embedding] * float(memory.model.text.tied_embeddings)


def layers_in(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Vision and decoder layers of slices."""
    vision = sum(counts[..., PARTS.index(part)] for part in VISION_LAYERS)
    return np.asarray(vision), counts[..., PARTS.index(Part.DECODER)]


def stage_memory(
    memory: MemoryModel, layout: PipelineLayout, recompute: tuple[SliceRecompute, ...], num_micro_batches: int
) -> list[StageMemory]:
    """Peak memory of each pipeline rank."""
    counts = slice_counts(memory.model, layout)
    features = waiting_features(counts) * memory.feature
    stages = []
    for rank in range(layout.pp_size):
        slices = [chunk * layout.pp_size + rank for chunk in range(layout.vpp_size)]
        kept = np.array([kept_by_slice(memory, counts[number], recompute[number]) for number in slices])
        kept += features[slices]
        in_flight = most_in_flight(layout.pp_size, layout.vpp_size, num_micro_batches, rank)
        activations = float((in_flight @ kept).max())
        mine = counts[slices]
        shared = shared_parameters(memory, mine)
        weights, gradients, optimizer = (float(values.sum()) for values in memory.static(mine, shared))
        # The gradient of what was received lives beside it.
        working = max(
            working_of_slice(memory, counts[number], recompute[number]) + features[number] for number in slices
        )
        used = weights + gradients + optimizer + activations + working
        stages.append(
            StageMemory(weights, gradients, optimizer, activations, working, memory.reserved + FRAGMENTATION * used)
        )
    return stages


def waiting_features(counts: np.ndarray) -> np.ndarray:
    """`[slices]`: DeepStack features that come with the message to a slice, for a decoder layer in it or behind it."""
    return waiting_before(np.concatenate([np.zeros((1, len(PARTS)), dtype=counts.dtype), counts.cumsum(axis=0)[:-1]]))


def waiting_before(before: np.ndarray) -> np.ndarray:
    """DeepStack features on their way where so many parts `[..., parts]` lie before."""
    return np.maximum(before[..., PARTS.index(Part.DEEPSTACK)] - before[..., PARTS.index(Part.DECODER)], 0)


def kept_by_slice(memory: MemoryModel, counts: np.ndarray, recompute: SliceRecompute) -> float:
    """Bytes that one micro-batch leaves in a slice until its backward pass."""
    saved = 0.0
    for asked, kinds in ((recompute.vision, VISION_LAYERS), (recompute.language, (Part.DECODER,))):
        layer = _mean_layer(memory, counts, kinds)
        saved += min(asked, layer.layers) * (layer.kept - layer.input)
    return float(counts @ memory.kept) - saved


class _Layer(NamedTuple):
    """A layer of a slice; where there are several kinds, their mean."""

    layers: int
    kept: float
    input: float
    working: float


def _mean_layer(memory: MemoryModel, counts: np.ndarray, kinds: Sequence[Part]) -> _Layer:
    places = [PARTS.index(kind) for kind in kinds]
    here = counts[places]
    share = here / max(1, here.sum())
    means = (float(values[places] @ share) for values in (memory.kept, memory.inputs, memory.working))
    return _Layer(int(here.sum()), *means)


def working_of_slice(memory: MemoryModel, counts: np.ndarray, recompute: SliceRecompute) -> float:
    """The most that is in use beside what all micro-batches in flight keep, when the backward pass of one goes through.

    It begins at the last part. When it comes to an earlier one, what the later ones kept is free again; a recomputed
    layer, which is one of the first of its kind, keeps all that it would have kept for the time of its own pass.
    """
    passes = [
        *_passes(memory, counts, Part.PATCH_EMBED),
        *_layer_passes(_mean_layer(memory, counts, VISION_LAYERS), recompute.vision),
        *_passes(memory, counts, Part.DEEPSTACK, Part.MERGER, Part.EMBEDDING),
        *_layer_passes(_mean_layer(memory, counts, (Part.DECODER,)), recompute.language),
        *_passes(memory, counts, Part.HEAD),
    ]
    freed, most = 0.0, 0.0
    for step in reversed(passes):
        most = max(most, step.working - freed)
        freed += step.kept
    return most


class _Backward(NamedTuple):
    """The backward pass of one or more parts."""

    kept: float
    """By all of them."""
    working: float
    """In use while one is computed."""


def _passes(memory: MemoryModel, counts: np.ndarray, *parts: Part) -> Iterator[_Backward]:
    for number in (PARTS.index(part) for part in parts):
        if counts[number]:
            yield _Backward(float(counts[number] * memory.kept[number]), float(memory.working[number]))


def _layer_passes(layer: _Layer, recomputed: int) -> Iterator[_Backward]:
    again = min(recomputed, layer.layers)
    if again:
        yield _Backward(again * layer.input, layer.working + layer.kept)
    if layer.layers > again:
        yield _Backward((layer.layers - again) * layer.kept, layer.working)
