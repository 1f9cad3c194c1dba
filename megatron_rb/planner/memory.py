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
from megatron_rb.config.schema import KernelsConfig
from megatron_rb.layout import PipelineLayout
from megatron_rb.planner.cost import Frozen
from megatron_rb.planner.schedule import most_in_flight
from megatron_rb.planner.sizes import ModelSizes, TextSizes, VisionSizes, padded_ffn
from megatron_rb.planner.work import PARTS, VISION_LAYERS, Part, Shards, gathered_values, parameters, part_counts
from megatron_rb.planner.workload import MicroBatchLimits

LOGITS_BYTES = 512 * 2**20
"""Largest fp32 logits that the loss holds at a time (as in kernels/linear_cross_entropy)."""
FRAGMENTATION = 0.04
"""Share of the tensors' memory that an allocator with reused block sizes leaves unusable: assumed."""


@dataclass(frozen=True)
class Operators:
    """Which operators are fused ones, which keep less for the backward pass than torch's own."""

    norm: bool
    """Keeps its input alone, which the residual keeps anyway; torch's keeps it in fp32, and the result."""
    windows: bool
    """Windowed attention keeps the packed projection; torch's keeps rotated queries and keys beside it."""


TORCH, FUSED = Operators(False, False), Operators(True, True)


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
        trained = counts @ self.trained - shared
        return held * self.state.weight, trained * self.state.gradient, trained * self.state.optimizer


def state_bytes(dtype: str, distributed: bool, copies: int, optimizer: OptimizerTraits) -> StateBytes:
    """megatron-core's DDP and an optimizer: bf16 has fp32 gradients and main weights, fp32 the optimizer's state alone.

    Args:
        copies: ranks with the same weights, data- and context-parallel ones.
    """
    over = copies if distributed else 1
    state = optimizer.state_bytes
    return StateBytes(2, 4, (FP32_BYTES + state) / over) if dtype == "bf16" else StateBytes(4, 4, state / over)


def operators_of(kernels: KernelsConfig, platform: str) -> Operators:
    """The operators that a run takes on devices of a platform."""
    on_cuda = platform == "cuda"
    return Operators(
        norm=kernels.rms_norm == "liger" or on_cuda and kernels.rms_norm == "auto",
        windows=kernels.window_attention == "triton" or on_cuda and kernels.window_attention == "auto",
    )


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
    kept = _kept(model, shards, largest, operators)
    rows = largest.patches / shards.rows_over, largest.tokens / shards.rows_over
    item = shards.itemsize
    inputs = {
        Part.WINDOW_LAYER: rows[0] * model.vision.hidden_size * item,
        Part.FULL_LAYER: rows[0] * model.vision.hidden_size * item,
        Part.DECODER: rows[1] * model.text.hidden_size * item,
    }
    idle = [not (frozen.trains(part) or frozen.passes_gradient(part)) for part in PARTS]
    numbers = np.array([sizes[part] for part in PARTS], dtype=np.float64)
    return MemoryModel(
        model,
        shards,
        numbers,
        numbers * [frozen.trains(part) for part in PARTS],
        np.array([0.0 if off else kept[part] for part, off in zip(PARTS, idle, strict=True)]),
        np.array([0.0 if off else inputs.get(part, kept[part]) for part, off in zip(PARTS, idle, strict=True)]),
        np.array(_working(model, shards, largest, kept)),
        state,
        reserved,
        largest.patches / model.vision.merge_unit * model.text.hidden_size * item,
    )


def _kept(model: ModelSizes, shards: Shards, largest: MicroBatchLimits, operators: Operators) -> dict[Part, float]:
    vision, text, item, tp = model.vision, model.text, shards.itemsize, shards.tp_size
    rows = largest.patches / vision.merge_unit
    # The first linear keeps its rows of this rank, the activation its input and the second linear that one's result.
    values = largest.patches * vision.hidden_size
    joined = values * ((2 / tp + 1 / shards.rows_over) * item + _norm(vision, item, operators) / shards.rows_over)
    # The loss computes its gradients at once: of its rows, and of its weight in fp32.
    head = largest.tokens * text.hidden_size * (item + _rms_norm(item, operators))
    weight = 4 * text.vocab_size / tp * text.hidden_size
    return {
        Part.PATCH_EMBED: largest.patches * float(vision.patch_dim * item),
        Part.WINDOW_LAYER: _vision_layer(vision, shards, largest.patches, operators, vision.window_size > 0),
        Part.FULL_LAYER: _vision_layer(vision, shards, largest.patches, operators, False),
        Part.DEEPSTACK: joined,
        Part.MERGER: joined,
        Part.EMBEDDING: largest.tokens * 16.0 + rows * text.hidden_size * item,
        Part.DECODER: _decoder(text, shards, largest.tokens, operators),
        Part.HEAD: head + weight,
    }


def _rms_norm(itemsize: int, operators: Operators) -> int:
    """Bytes kept by an RMSNorm for one value of its input."""
    return itemsize if operators.norm else 4 + itemsize


def _norm(vision: VisionSizes, itemsize: int, operators: Operators) -> int:
    return _rms_norm(itemsize, operators) if vision.norm == "rmsnorm" else itemsize


def _vision_layer(vision: VisionSizes, shards: Shards, patches: int, operators: Operators, windowed: bool) -> float:
    item, tp, h = shards.itemsize, shards.tp_size, vision.hidden_size
    ffn = padded_ffn(vision.ffn_hidden_size, tp)
    rows = patches / shards.rows_over
    # Two norms and the inputs of the two linears behind them.
    spread = rows * h * 2 * (_norm(vision, item, operators) + item)
    # qkv in one piece and the result; without a fused operator rotated q and k, and the log of the sums.
    fused = windowed and operators.windows
    attention = patches * ((4 if fused else 6) * h / tp * item + (0 if fused else 4 * vision.num_heads / tp))
    return spread + attention + patches * ffn * item * (3 if vision.gated_mlp else 2)


def _decoder(text: TextSizes, shards: Shards, tokens: int, operators: Operators) -> float:
    item, tp, h = shards.itemsize, shards.tp_size, text.hidden_size
    rows = tokens / shards.rows_over
    spread = rows * h * 2 * (_rms_norm(item, operators) + item)
    # qkv in one piece, of which v is read, rotated q and k, the result; with QK-norm q as it came, in one piece where
    # several groups were packed. With context parallelism rotated q and the result; keys and values are read where they
    # were gathered.
    values = 2 * text.num_heads if shards.cp_size > 1 else 3 * (text.num_heads + text.num_query_groups)
    attention = values * text.head_dim / tp * item
    normed = _qk_norm(text, shards, operators) * text.head_dim / tp * item if text.qk_norm else 0.0
    mlp = 3 * padded_ffn(text.ffn_hidden_size, tp) * item
    gathered = _whole_keys(text, shards, tokens)
    return spread + tokens * (attention + normed + mlp + 4 * text.num_heads / tp) + gathered


def _qk_norm(text: TextSizes, shards: Shards, operators: Operators) -> int:
    """Heads that QK-norm keeps of its input beside what attention keeps."""
    if not operators.norm:
        return text.num_heads + text.num_query_groups
    copied = text.num_heads * (text.num_query_groups > shards.tp_size)
    # Keys are a part of the projection, which with context parallelism nobody else keeps.
    return copied + (text.num_heads + 2 * text.num_query_groups) * (shards.cp_size > 1)


def _whole_keys(text: TextSizes, shards: Shards, tokens: float) -> float:
    """Keys and values that the tokens of a context-parallel rank attend to: those of all tokens at most, and for the
    earlier one of its two chunks once more those before it."""
    return gathered_values(text, shards) * tokens * (shards.cp_size + 0.5) * shards.itemsize


def _working(model: ModelSizes, shards: Shards, largest: MicroBatchLimits, kept: dict[Part, float]) -> list[float]:
    vision, text, tp, item = model.vision, model.text, shards.tp_size, shards.itemsize
    # The gradients of a layer's widest tensors live beside what it has kept.
    wide = {
        # Where positions are learned: four corners of every patch, and in fp32 what they weigh and their sum.
        Part.PATCH_EMBED: kept[Part.PATCH_EMBED]
        + (vision.position_grid_side > 0) * largest.patches * vision.hidden_size * (4.0 * item + 5 * 4),
        # The gradient of the whole table.
        Part.EMBEDDING: kept[Part.EMBEDDING] + 1.0 * text.vocab_size / tp * text.hidden_size * item,
        Part.WINDOW_LAYER: 3.0 * largest.patches * padded_ffn(vision.ffn_hidden_size, tp) * item,
        Part.DECODER: max(
            3.0 * largest.tokens * padded_ffn(text.ffn_hidden_size, tp) * item,
            # Their gradients, once as attention gives them and once as they are sent.
            2.0 * _whole_keys(text, shards, largest.tokens),
        ),
        # Logits of a chunk of rows and their gradient; later the weight's gradient once more in the model's dtype.
        Part.HEAD: max(
            min(largest.tokens * text.vocab_size / tp * 4, LOGITS_BYTES) * (1 + item / 2),
            text.vocab_size / tp * text.hidden_size * item,
        ),
    }
    wide[Part.FULL_LAYER] = wide[Part.WINDOW_LAYER]
    return [wide.get(part, kept[part]) for part in PARTS]


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
