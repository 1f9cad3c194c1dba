"""`MicroBatch`: packed samples with every index the model needs, computed once on the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from megatron_rb.data.padding import Size
from megatron_rb.data.sample import IGNORED, EncodedSample
from megatron_rb.kernels.dynamic_padding.row_map import RowMap
from megatron_rb.kernels.mrope.reference import mrope_angles, vision_angles
from megatron_rb.kernels.varlen_attention.segments import Segments
from megatron_rb.layout.token_axis import Range, parts_in, ranges_of_rank, token_multiple
from megatron_rb.models.frames import FrameShares, frame_order
from megatron_rb.models.positions import interpolation_indices, mrope_positions, patch_positions
from megatron_rb.shapes.families import VideoTime
from megatron_rb.shapes.shape import RoboBrainShape

NOT_YET = torch.empty(0)
"""Stands for rotary angles before the batch is on its device."""


@dataclass(frozen=True)
class VisionInputs:
    """Patches of a micro-batch in window order, padded to whole merge units for every tensor-parallel rank or more.

    Under context parallelism those of the frames of this rank; every rank has as many rows.
    """

    num_patches: int
    """Rows, padding included; never 0, so that every parameter gets a gradient in a batch without images."""
    num_real_patches: int
    frames: Segments
    """Patches that full attention joins: one frame of a video, or an image."""
    windows: Segments | None
    """Patches that windowed attention joins; None when the model has no windows."""
    positions: torch.Tensor
    """int32 `[patches, 2]`"""
    position_indices: torch.Tensor
    """int32 `[patches, 4]`, empty when the model has no learned positions."""
    position_weights: torch.Tensor
    pixels: torch.Tensor | None
    """`[patches, patch_dim]`, float32 or the type of the model; None on ranks that do not hold the patch embedding."""
    pixels_shared: bool = False
    """Whether this rank has the pixels of some samples only and zeros for the others, which the other tensor-parallel
    ranks have."""
    rope_cos: torch.Tensor = NOT_YET
    """float32 `[patches, head_dim / 2]`, computed by `to_device`."""
    rope_sin: torch.Tensor = NOT_YET


@dataclass(frozen=True)
class ContextKeys:
    """The keys that the tokens of a context-parallel rank attend to."""

    segments: Segments
    """One for each segment of the tokens: from the beginning of the sample to the end of its part on this rank."""
    ranges: tuple[Range, ...]
    """Rows of the whole token axis that they are, one after the other."""

    def to(self, device: torch.device, non_blocking: bool = False) -> ContextKeys:
        return replace(self, segments=self.segments.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> ContextKeys:
        return replace(self, segments=self.segments.pin_memory())


@dataclass(frozen=True)
class TextInputs:
    """Tokens of a micro-batch: samples one after the other, padding as a segment of its own.

    Under context parallelism the tokens of this rank (`layout.token_axis`), parts of samples one after the other.
    """

    num_tokens: int
    """Rows, padding included."""
    num_real_tokens: int
    """Rows before the padding."""
    samples: Segments
    input_ids: torch.Tensor
    """int64 `[tokens]`"""
    positions: torch.Tensor
    """int32 `[3, tokens]`"""
    visual: RowMap
    """From rows of the merger's output (of all context-parallel ranks) to the tokens that are image or video
    placeholders."""
    local_visual: RowMap
    """The part of `visual` on this rank under sequence parallelism, tokens counted from its first one."""
    label_rows: torch.Tensor
    """int64: tokens whose next token is trained on; at least one row."""
    labels: torch.Tensor
    """int64: the token to predict at each of `label_rows`."""
    label_weights: torch.Tensor
    """float32: 1 for a label, 0 for the filler row of a batch without labels."""
    keys: ContextKeys | None = None
    """None = the tokens see each other alone: there is no context parallelism."""
    rope_cos: torch.Tensor = NOT_YET
    """float32 `[tokens, head_dim / 2]`, computed by `to_device`."""
    rope_sin: torch.Tensor = NOT_YET


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass reads, on every pipeline stage."""

    vision: VisionInputs
    text: TextInputs
    sample_ids: tuple[str, ...]

    @property
    def num_labels(self) -> int:
        return int(self.text.label_weights.sum())


def build_micro_batch(
    samples: Sequence[EncodedSample],
    shape: RoboBrainShape,
    *,
    tp_rank: int,
    tp_size: int,
    sequence_parallel: bool,
    cp_rank: int = 0,
    cp_size: int = 1,
    padded: Size = Size(0, 0),
    pixels_shared: bool = False,
) -> MicroBatch:
    """Pack samples into one micro-batch; no samples give a batch of padding with no loss.

    Args:
        padded: rows of all context-parallel ranks to pad to, where the samples have fewer; they are never cut.
        pixels_shared: see `VisionInputs`.

    Raises:
        ValueError: a sample whose placeholders do not match its images.
    """
    vision, rows_over = shape.vision, tp_size if sequence_parallel else 1
    shares = FrameShares.of([grid for sample in samples for grid in sample.grids], cp_size)
    patches = shares.padded_patches(padded.patches, vision.merge_unit * rows_over)
    merged = patches // vision.merge_unit
    visual_rows = shares.merged_rows(vision.spatial_merge_size, _window_side(shape), merged)
    text = _text_inputs(
        samples, shape, visual_rows, merged * cp_size, token_multiple(cp_size, rows_over), padded.tokens
    )
    if cp_size > 1:
        text = _context_part(text, cp_rank, cp_size)
    if sequence_parallel:
        text = _local_visuals(text, tp_rank, tp_size)
    inputs = _vision_inputs(samples, shares, cp_rank, shape, patches)
    return MicroBatch(replace(inputs, pixels_shared=pixels_shared), text, tuple(sample.sample_id for sample in samples))


def _window_side(shape: RoboBrainShape) -> int:
    """Merged tokens along the side of an attention window; 0 = the model has no windows."""
    vision = shape.vision
    return max(1, vision.window_size // vision.patch_size // vision.spatial_merge_size) if vision.window_size else 0


def _vision_inputs(
    samples: Sequence[EncodedSample], shares: FrameShares, cp_rank: int, shape: RoboBrainShape, total: int
) -> VisionInputs:
    vision, window = shape.vision, _window_side(shape)
    merge, unit = vision.spatial_merge_size, vision.merge_unit
    positions, indices, weights, orders, window_lengths, frame_lengths = [], [], [], [], [], []
    for grid in shares.grids_of(cp_rank):
        where = patch_positions(grid, merge)
        order, lengths = frame_order(grid.h, grid.w, merge, window)
        orders += [order] * grid.t
        in_frame = (order[:, None] * unit + np.arange(unit)).reshape(-1)
        patch_order = (np.arange(grid.t)[:, None] * len(in_frame) + in_frame).reshape(-1)
        positions.append(where[patch_order])
        if vision.position_grid_side:
            index, weight = interpolation_indices(where, grid, vision.position_grid_side)
            indices.append(index[patch_order])
            weights.append(weight[patch_order])
        window_lengths += [length * unit for length in lengths] * grid.t
        frame_lengths += [len(in_frame)] * grid.t
    real = sum(frame_lengths)
    # In pieces of a window, so that padding costs no more than patches do and kernels for windows can take it.
    piece = unit * max(window, 1) ** 2
    tail = [min(piece, total - done) for done in range(real, total, piece)]
    grid_rows = total if vision.position_grid_side else 0
    return VisionInputs(
        num_patches=total,
        num_real_patches=real,
        frames=Segments.of_lengths(frame_lengths + tail),
        windows=Segments.of_lengths(window_lengths + tail) if window else None,
        positions=_rows(positions, (total, 2), np.int32),
        position_indices=_rows(indices, (grid_rows, 4), np.int32),
        position_weights=_rows(weights, (grid_rows, 4), np.float32),
        pixels=_pixels_of(samples, shares, cp_rank, orders, unit, (total, vision.patch_dim)),
    )


def _pixels_of(
    samples: Sequence[EncodedSample],
    shares: FrameShares,
    cp_rank: int,
    orders: list[np.ndarray],
    unit: int,
    shape: tuple[int, int],
) -> torch.Tensor | None:
    if any(sample.pixels is None for sample in samples):
        return None
    arrays = shares.pixels_of(cp_rank, [array for sample in samples for array in sample.pixels or []])
    grids = shares.grids_of(cp_rank)
    frames = [frame for grid, array in zip(grids, arrays, strict=True) for frame in np.split(array, grid.t)]
    return _ordered_pixels(frames, orders, unit, shape)


def _ordered_pixels(
    pixels: list[np.ndarray], orders: list[np.ndarray], unit: int, shape: tuple[int, int]
) -> torch.Tensor:
    """All patches in window order and zeros behind them, written in one pass: this is the largest array of a batch.

    Args:
        pixels: for each frame its patches in merge-block order.
        orders: for each frame its merged tokens in window order.
    """
    out = np.empty((shape[0] // unit, unit * shape[1]), dtype=np.float32)
    start = 0
    for array, order in zip(pixels, orders, strict=True):
        np.take(array.reshape(len(order), -1), order, axis=0, out=out[start : start + len(order)])
        start += len(order)
    out[start:] = 0
    return torch.from_numpy(out.reshape(shape))


def _rows(parts: list[np.ndarray], shape: tuple[int, int], dtype: type) -> torch.Tensor:
    """The parts below each other in a zero-filled array of a given shape."""
    out: np.ndarray = np.zeros(shape, dtype=dtype)
    if parts:
        stacked = np.concatenate(parts)
        out[: len(stacked)] = stacked
    return torch.from_numpy(out)


def _text_inputs(
    samples: Sequence[EncodedSample],
    shape: RoboBrainShape,
    visual_rows: np.ndarray,
    num_merged: int,
    multiple: int,
    wanted: int,
) -> TextInputs:
    ids, labels, positions, lengths = [], [], [], []
    for sample in samples:
        visual = np.isin(sample.input_ids, (shape.image_token_id, shape.video_token_id))
        positions.append(
            mrope_positions(
                visual,
                sample.grids,
                shape.vision.spatial_merge_size,
                shape.vision.tokens_per_second,
                split_video_frames=shape.traits.video_time is VideoTime.TEXT,
            )
        )
        ids.append(sample.input_ids)
        labels.append(np.append(sample.labels[1:], IGNORED))
        lengths.append(len(sample.input_ids))
    real = sum(lengths)
    padding = _padding(real, wanted, multiple)
    if padding:
        ids.append(np.zeros(padding, dtype=np.int64))
        labels.append(np.full(padding, IGNORED))
        positions.append(np.tile(np.arange(padding), (3, 1)))
        lengths.append(padding)
    all_ids = np.concatenate(ids).astype(np.int64)
    all_labels = np.concatenate(labels).astype(np.int64)
    # Padding is token 0 and must not be taken for an image, whatever that id means.
    visual_positions = np.flatnonzero(np.isin(all_ids[:real], (shape.image_token_id, shape.video_token_id)))
    visual_map = RowMap.of(visual_positions, visual_rows, len(all_ids), num_merged)
    label_rows = np.flatnonzero(all_labels != IGNORED)
    return TextInputs(
        num_tokens=len(all_ids),
        num_real_tokens=real,
        samples=Segments.of_lengths(lengths),
        input_ids=torch.from_numpy(all_ids),
        positions=torch.from_numpy(np.concatenate(positions, axis=1).astype(np.int32)),
        visual=visual_map,
        local_visual=visual_map,
        **_label_inputs(label_rows, all_labels[label_rows]),
    )


def _label_inputs(rows: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """The fields on labels: those given, or a filler row without weight, since the head wants some row."""
    weights = np.ones(len(rows), dtype=np.float32)
    if not len(rows):
        rows, labels, weights = np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.float32)
    values = map(torch.from_numpy, (rows, labels, weights))
    return dict(zip(("label_rows", "labels", "label_weights"), values, strict=True))


def _padding(real: int, wanted: int, multiple: int) -> int:
    """Rows to add: up to `wanted`, then to the next multiple; at least one row in all."""
    rows = max(real, wanted, 1)
    return rows + -rows % multiple - real


def _context_part(text: TextInputs, cp_rank: int, cp_size: int) -> TextInputs:
    """The tokens of one context-parallel rank."""
    ranges = ranges_of_rank(text.num_tokens, cp_rank, cp_size)
    rows = np.concatenate([np.arange(*each) for each in ranges])
    parts = parts_in(text.samples.borders, ranges)
    visual = text.visual.of_rows(rows)
    place = np.full(text.num_tokens, -1)
    place[rows] = np.arange(len(rows))
    label_places = place[text.label_rows.numpy()]
    mine = (label_places >= 0) & (text.label_weights.numpy() > 0)
    return replace(
        text,
        num_tokens=len(rows),
        num_real_tokens=int((rows < text.num_real_tokens).sum()),
        samples=Segments.of_lengths(parts.lengths),
        input_ids=text.input_ids[rows],
        positions=text.positions[:, rows].contiguous(),
        visual=visual,
        local_visual=visual,
        keys=ContextKeys(Segments.of_lengths(parts.key_lengths), parts.key_ranges),
        **_label_inputs(label_places[mine], text.labels.numpy()[mine]),
    )


def _local_visuals(text: TextInputs, tp_rank: int, tp_size: int) -> TextInputs:
    width = text.num_tokens // tp_size
    return replace(text, local_visual=text.visual.of_rows(np.arange(tp_rank * width, (tp_rank + 1) * width)))


def to_device(
    batch: MicroBatch, shape: RoboBrainShape, device: torch.device, *, with_pixels: bool = True
) -> MicroBatch:
    """Move a micro-batch and compute the rotary angles there, in fp32.

    Args:
        with_pixels: whether the model chunk that it is for holds the patch embedding; else pixels stay behind.
    """
    vision = _move(batch.vision if with_pixels else replace(batch.vision, pixels=None), device)
    cos, sin = vision_angles(vision.positions, shape.vision.head_dim, shape.vision.rope_theta)
    return replace(
        batch,
        vision=replace(vision, rope_cos=cos, rope_sin=sin),
        text=text_to_device(batch.text, shape, device),
    )


def text_to_device(text: TextInputs, shape: RoboBrainShape, device: torch.device) -> TextInputs:
    """The text part of `to_device`."""
    text = _move(text, device)
    sizes = shape.text
    cos, sin = mrope_angles(
        text.positions, sizes.head_dim, sizes.rope_theta, sizes.mrope_section, sizes.mrope_interleaved
    )
    return replace(text, rope_cos=cos, rope_sin=sin)


def with_pixels_as(batch: MicroBatch, dtype: torch.dtype) -> MicroBatch:
    """The same with its pixels rounded on the host, as the device would round them: half the bytes to copy in bf16."""
    pixels = batch.vision.pixels
    if pixels is None or pixels.dtype == dtype:
        return batch
    return replace(batch, vision=replace(batch.vision, pixels=_rounded(pixels, dtype)))


def _rounded(pixels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return pixels.to(dtype)


def pinned(batch: MicroBatch) -> MicroBatch:
    """The same in page-locked memory. From other memory a device copies only when all work before is done."""
    return replace(batch, vision=_each(batch.vision, _pin), text=_each(batch.text, _pin))


def _pin(value):
    return value if value is NOT_YET else value.pin_memory()


def _move(inputs, device: torch.device):
    return _each(inputs, lambda value: value.to(device, non_blocking=True))


def _each(inputs, change: Callable):
    """The inputs with every tensor, and everything that holds one, changed."""
    changed = {
        field.name: change(value)
        for field in fields(inputs)
        if isinstance(value := getattr(inputs, field.name), torch.Tensor | Segments | RowMap | ContextKeys)
    }
    return replace(inputs, **changed)
