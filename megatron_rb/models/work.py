"""What a batch asks of a model: counts of real rows, and the FLOPs that follow from them."""

from __future__ import annotations

from dataclasses import astuple, dataclass

import numpy as np

from megatron_rb.config.schema import FreezeConfig
from megatron_rb.kernels.varlen_attention.segments import Segments
from megatron_rb.layout import Kind
from megatron_rb.models.inputs import MicroBatch
from megatron_rb.shapes.balance import matrix_weights
from megatron_rb.shapes.shape import RoboBrainShape

NOTHING_FROZEN = FreezeConfig()


@dataclass(frozen=True)
class Work:
    """Counts of a batch, padding excluded; those of several batches add up."""

    samples: int = 0
    tokens: int = 0
    labels: int = 0
    patches: int = 0
    token_squares: int = 0
    """Sum of the squared lengths of the samples: what causal attention goes by."""
    frame_squares: int = 0
    """Sum of the squared numbers of patches of the images and video frames: what full attention in the ViT goes by."""
    window_squares: int = 0
    """The same for the windows of the ViT; 0 when it has none."""

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of forward and backward pass, matrix products and attention alone."""

    vision: float
    merger: float
    language: float

    @property
    def total(self) -> float:
        return self.vision + self.merger + self.language


def work_of(batch: MicroBatch) -> Work:
    """Counts of one micro-batch; the same on every rank that was given it, but for context-parallel ones: theirs add up
    to what it holds, except for the samples."""
    vision, text = batch.vision, batch.text
    seen = text.keys.segments if text.keys is not None else None
    return Work(
        samples=len(batch.sample_ids),
        tokens=text.num_real_tokens,
        labels=batch.num_labels,
        patches=vision.num_real_patches,
        token_squares=_squares(text.samples, text.num_real_tokens, seen),
        frame_squares=_squares(vision.frames, vision.num_real_patches),
        window_squares=_squares(vision.windows, vision.num_real_patches) if vision.windows is not None else 0,
    )


def training_flops(shape: RoboBrainShape, work: Work, freeze: FreezeConfig = NOTHING_FROZEN) -> Flops:
    """Operations that a training step needs at least.

    A product counts two operations per multiply-add. Causal attention counts half of the square. Logits count for
    labels only. The backward pass counts twice the forward pass, less what frozen parts do not need; what is computed
    again to save memory does not count, and neither do norms, activations, rotations and other work per value.
    """
    vision, text, weights = shape.vision, shape.text, matrix_weights(shape)
    trains_vision, trains_merger, trains_language = not freeze.vision, not freeze.merger, not freeze.language
    reaches_vision, reaches_merger = trains_vision, trains_vision or trains_merger
    reaches_language = reaches_merger or trains_language

    windowed = vision.num_layers - len(vision.full_attention_layers) if vision.window_size else 0
    squares = windowed * work.window_squares + (vision.num_layers - windowed) * work.frame_squares
    vision_flops = 2.0 * work.patches * (
        weights[Kind.PATCH_EMBED] * _passes(trains_vision, False)
        + vision.num_layers * weights[Kind.VISION] * _passes(trains_vision, reaches_vision)
    ) + 4.0 * vision.hidden_size * squares * _passes(reaches_vision, reaches_vision)

    mergers = 1 + len(vision.deepstack_layers)
    merger_flops = (
        2.0
        * work.patches
        / vision.merge_unit
        * mergers
        * weights[Kind.MERGER]
        * (
            # Their norms have weights, which need the gradient of the first product's input.
            _passes(trains_merger, reaches_merger)
        )
    )

    layer = 2.0 * work.tokens * weights[Kind.DECODER] * _passes(trains_language, reaches_language)
    attention = 2.0 * text.num_heads * text.head_dim * work.token_squares * _passes(reaches_language, reaches_language)
    head = 2.0 * work.labels * weights[Kind.HEAD] * _passes(trains_language, reaches_language)
    return Flops(vision_flops, merger_flops, text.num_layers * (layer + attention) + head)


def _passes(weights_train: bool, input_trains: bool) -> int:
    """Products of the size of the forward one: itself, the gradient of the weights, the gradient of the input."""
    return 1 + weights_train + input_trains


def _squares(segments: Segments, real_rows: int, keys: Segments | None = None) -> int:
    """Sum of the squared lengths of the segments. With `keys` each is the end of a longer one, and the square of what
    is before it is taken off, so that the parts of a segment add up to it."""
    lengths = np.diff([border for border in segments.borders if border <= real_rows]).astype(np.int64)
    ends = np.array((keys or segments).lengths[: len(lengths)], dtype=np.int64)
    return int((ends**2 - (ends - lengths) ** 2).sum())
