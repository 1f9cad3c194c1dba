"""`MicroBatch`: packed samples with every index the model needs, computed once on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from megatron_rb.data.padding import Size
from megatron_rb.data.sample import EncodedSample
from megatron_rb.kernels.dynamic_padding.row_map import RowMap
from megatron_rb.kernels.mrope.reference import mrope_angles, vision_angles
from megatron_rb.kernels.varlen_attention.segments import Segments
from megatron_rb.models.robobrain.config import RoboBrainShape
from megatron_rb.models.robobrain.positions import (
    interpolation_taps,
    mrope_positions,
    patch_positions,
    window_order,
)

IGNORED = -100
"""Label of a token that no loss is taken of."""
NOT_YET = torch.empty(0)
"""Stands for rotary angles before the batch is on its device."""


@dataclass(frozen=True)
class VisionInputs:
    """Patches of a micro-batch in window order, padded to whole merge units for every tensor-parallel rank or more."""

    num_patches: int
    """Rows, padding included; never 0, so that every parameter gets a gradient in a batch without images."""
    num_real_patches: int
    frames: Segments
    """Patches that full attention joins: one frame of a video, or an image."""
    windows: Segments | None
    """Patches that windowed attention joins; None when the model has no windows."""
    positions: torch.Tensor
    """int32 `[patches, 2]`"""
    position_taps: torch.Tensor
    """int32 `[patches, 4]`, empty when the model has no learned positions."""
    position_weights: torch.Tensor
    pixels: torch.Tensor | None
    """float32 `[patches, patch_dim]`; None on ranks that do not hold the patch embedding."""
    rope_cos: torch.Tensor = NOT_YET
    """float32 `[patches, head_dim / 2]`, computed by `to_device`."""
    rope_sin: torch.Tensor = NOT_YET


@dataclass(frozen=True)
class TextInputs:
    """Tokens of a micro-batch: samples one after the other, padding as a segment of its own."""

    num_tokens: int
    """Rows, padding included."""
    num_real_tokens: int
    samples: Segments
    input_ids: torch.Tensor
    """int64 `[tokens]`"""
    positions: torch.Tensor
    """int32 `[3, tokens]`"""
    visual: RowMap
    """From rows of the merger's output to the tokens that are image or video placeholders."""
    local_visual: RowMap
    """The part of `visual` on this rank under sequence parallelism, tokens counted from its first one."""
    label_rows: torch.Tensor
    """int64: tokens whose next token is trained on; at least one row."""
    labels: torch.Tensor
    """int64: the token to predict at each of `label_rows`."""
    label_weights: torch.Tensor
    """float32: 1 for a label, 0 for the filler row of a batch without labels."""
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
    samples: Sequence[EncodedSample], shape: RoboBrainShape, *, tp_rank: int, tp_size: int, sequence_parallel: bool,
    padded: Size = Size(0, 0),
) -> MicroBatch:  # fmt: skip
    """Pack samples into one micro-batch; no samples give a batch of padding with no loss.

    Args:
        padded: rows to pad to, where the samples have fewer; they are never cut.

    Raises:
        ValueError: a sample whose placeholders do not match its images.
    """
    token_multiple = tp_size if sequence_parallel else 1
    patch_multiple = shape.vision.merge_unit * token_multiple
    vision, visual_rows = _vision_inputs(samples, shape, patch_multiple, padded.patches)
    merged = vision.num_patches // shape.vision.merge_unit
    text = _text_inputs(samples, shape, visual_rows, merged, token_multiple, padded.tokens)
    if sequence_parallel:
        text = _local_visuals(text, tp_rank, tp_size)
    return MicroBatch(vision, text, tuple(sample.sample_id for sample in samples))


def _vision_inputs(
    samples: Sequence[EncodedSample], shape: RoboBrainShape, multiple: int, wanted: int
) -> tuple[VisionInputs, np.ndarray]:
    """The vision part, and for every merged token in reading order its row in the merger's output."""
    vision = shape.vision
    merge, unit = vision.spatial_merge_size, vision.merge_unit
    grids = [grid for sample in samples for grid in sample.grids]
    pixels = [array for sample in samples for array in sample.pixels or []]
    has_pixels = all(sample.pixels is not None for sample in samples)
    window = max(1, vision.window_size // vision.patch_size // merge)
    positions, taps, weights, orders, window_lengths, frame_lengths = [], [], [], [], [], []
    offset = 0
    for grid in grids:
        where = patch_positions(grid, merge)
        tokens = grid.patches // unit
        order, lengths = window_order(grid, merge, window) if vision.window_size else (np.arange(tokens), [])
        patch_order = (order[:, None] * unit + np.arange(unit)).reshape(-1)
        positions.append(where[patch_order])
        if vision.position_grid_side:
            index, weight = interpolation_taps(where, grid, vision.position_grid_side)
            taps.append(index[patch_order])
            weights.append(weight[patch_order])
        orders.append(order + offset)
        window_lengths += [length * unit for length in lengths]
        frame_lengths += [grid.h * grid.w] * grid.t
        offset += tokens
    real = offset * unit
    padding = _padding(real, wanted, multiple)
    order = np.concatenate([*orders, np.arange(offset, offset + padding // unit)]).astype(np.int64)
    rows = np.empty_like(order)
    rows[order] = np.arange(len(order))  # the merger's output stands in window order
    total = real + padding
    # In pieces of a window, so that padding costs no more than patches do and kernels for windows can take it.
    piece = unit * window**2
    tail = [min(piece, padding - done) for done in range(0, padding, piece)]
    return VisionInputs(
        num_patches=total,
        num_real_patches=real,
        frames=Segments.of_lengths(frame_lengths + tail),
        windows=Segments.of_lengths(window_lengths + tail) if vision.window_size else None,
        positions=_rows(positions, (total, 2), np.int32),
        position_taps=_rows(taps, (total if vision.position_grid_side else 0, 4), np.int32),
        position_weights=_rows(weights, (total if vision.position_grid_side else 0, 4), np.float32),
        pixels=_ordered_pixels(pixels, orders, unit, (total, vision.patch_dim)) if has_pixels else None,
    ), rows[:offset]


def _ordered_pixels(
    pixels: list[np.ndarray], orders: list[np.ndarray], unit: int, shape: tuple[int, int]
) -> torch.Tensor:
    """All patches in window order and zeros behind them, written in one pass: this is the largest array of a batch.

    Args:
        orders: for each grid the place of its merged tokens, counted from the first grid.
    """
    out = np.empty((shape[0] // unit, unit * shape[1]), dtype=np.float32)
    start = 0
    for array, order in zip(pixels, orders, strict=True):
        tokens = array.reshape(len(order), -1)
        np.take(tokens, order - start, axis=0, out=out[start : start + len(order)])
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
    samples: Sequence[EncodedSample], shape: RoboBrainShape, visual_rows: np.ndarray, num_merged: int, multiple: int,
    wanted: int,
) -> TextInputs:  # fmt: skip
    ids, labels, positions, lengths = [], [], [], []
    for sample in samples:
        visual = np.isin(sample.input_ids, (shape.image_token_id, shape.video_token_id))
        positions.append(
            mrope_positions(
                visual, sample.grids, shape.vision.spatial_merge_size, shape.vision.tokens_per_second,
                split_video_frames=shape.family == "qwen3_vl",
            )
        )  # fmt: skip
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
    weights = np.ones(max(len(label_rows), 1), dtype=np.float32)
    if not len(label_rows):
        label_rows, weights = np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.float32)
    return TextInputs(
        num_tokens=len(all_ids),
        num_real_tokens=real,
        samples=Segments.of_lengths(lengths),
        input_ids=torch.from_numpy(all_ids),
        positions=torch.from_numpy(np.concatenate(positions, axis=1).astype(np.int32)),
        visual=visual_map,
        local_visual=visual_map,
        label_rows=torch.from_numpy(label_rows),
        labels=torch.from_numpy(np.maximum(all_labels[label_rows], 0)),
        label_weights=torch.from_numpy(weights),
    )


def _padding(real: int, wanted: int, multiple: int) -> int:
    """Rows to add: up to `wanted`, then to the next multiple; at least one row in all."""
    rows = max(real, wanted, 1)
    return rows + -rows % multiple - real


def _local_visuals(text: TextInputs, tp_rank: int, tp_size: int) -> TextInputs:
    width = text.num_tokens // tp_size
    start = tp_rank * width
    positions, rows = text.visual.rows.numpy(), text.visual.sources.numpy()
    mine = (positions >= start) & (positions < start + width)
    local = RowMap.of(positions[mine] - start, rows[mine], width, text.visual.num_sources)
    return replace(text, local_visual=local)


def to_device(batch: MicroBatch, shape: RoboBrainShape, device: torch.device) -> MicroBatch:
    """Move a micro-batch and compute the rotary angles there, in fp32."""
    vision = _move(batch.vision, device)
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


def _move(inputs, device: torch.device):
    moved = {
        field.name: value.to(device, non_blocking=True)
        for field in fields(inputs)
        if isinstance(value := getattr(inputs, field.name), torch.Tensor | Segments | RowMap)
    }
    return replace(inputs, **moved)
