"""Which samples and rows of a step are kept: a rule that no layout, data parallelism or packing has a part in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_rb.capture.points import Point, Rows
from megatron_rb.checkpoint.storage.checksum import Checksum
from megatron_rb.config.schema import CaptureConfig
from megatron_rb.models.inputs import MicroBatch


@dataclass(frozen=True)
class PlacedSample:
    """A sample of the step and where it lies on this rank."""

    sample_id: str
    batch: int
    """Number of the micro-batch."""
    token_start: int
    tokens: int
    patch_start: int
    patches: int

    @property
    def size(self) -> tuple[str, int, int]:
        return self.sample_id, self.tokens, self.patches


def placed_samples(batches: Sequence[MicroBatch], merge_unit: int) -> list[PlacedSample]:
    """All samples of this rank's micro-batches."""
    found = []
    for number, batch in enumerate(batches):
        visual = np.sort(batch.text.visual.rows.numpy())
        patch_start = 0
        for place, sample_id in enumerate(batch.sample_ids):
            start, stop = batch.text.samples.borders[place : place + 2]
            patches = int(((visual >= start) & (visual < stop)).sum()) * merge_unit
            found.append(PlacedSample(sample_id, number, start, stop - start, patch_start, patches))
            patch_start += patches
    return found


def choose(sizes: Sequence[tuple[str, int, int]], count: int) -> list[str]:
    """Ids of the samples that are kept: first the one with the fewest patches above 0, then the shortest ones.

    Args:
        sizes: (id, tokens, patches) of all samples of the step, in any order.
    """
    known = sorted({(tokens, patches, name) for name, tokens, patches in sizes})
    with_vision = sorted((patches, tokens, name) for tokens, patches, name in known if patches)
    order = [name for _, _, name in with_vision[:1]] + [name for _, _, name in known]
    return list(dict.fromkeys(order))[:count]


@dataclass(frozen=True)
class Pick:
    """The rows of one sample that are kept, as offsets from its first row."""

    number: int
    """Among the kept samples of the step."""
    sample: PlacedSample
    offsets: dict[Rows, np.ndarray]
    context: dict[Rows, np.ndarray]
    """All rows that the kept ones attend to; where they are too many, the kept rows alone."""
    first_rows: dict[Rows, int]
    """Row of the micro-batch that an offset of 0 is (labels: see `label_rows`)."""
    label_rows: np.ndarray
    """Places among the micro-batch's label rows of the kept ones."""

    def rows_of(self, point: Point) -> tuple[np.ndarray, np.ndarray]:
        """Offsets in the sample, and the rows of the micro-batch's full tensor, of one point."""
        offsets = (self.context if point.context else self.offsets)[point.rows]
        if point.rows is Rows.LABEL:
            return offsets, self.label_rows
        return offsets, offsets + self.first_rows[point.rows]


def pick_rows(number: int, sample: PlacedSample, batch: MicroBatch, settings: CaptureConfig, merge_unit: int) -> Pick:
    """Rows spread evenly over the beginning of a sample, at most `rows` within the first `context` ones."""
    tokens = _spread(min(sample.tokens, settings.context), settings.rows)
    merged = _spread(min(sample.patches, settings.context) // merge_unit, max(1, settings.rows // merge_unit))
    # Whole merge units, so that the merger can be computed from them.
    patches = (merged[:, None] * merge_unit + np.arange(merge_unit)).reshape(-1)
    labels = batch.text.label_rows.numpy()
    real = batch.text.label_weights.numpy() > 0
    mine = np.flatnonzero(real & (labels >= sample.token_start) & (labels < sample.token_start + sample.tokens))
    mine = mine[_spread(len(mine), settings.rows)]
    first_merged = sample.patch_start // merge_unit
    return Pick(
        number,
        sample,
        {
            Rows.TOKEN: tokens,
            Rows.PATCH: patches,
            Rows.MERGED: merged,
            Rows.LABEL: labels[mine] - sample.token_start,
        },
        {
            Rows.TOKEN: np.arange(tokens[-1] + 1) if len(tokens) else tokens,
            Rows.PATCH: _vision_context(patches, sample, batch, settings.context),
        },
        {Rows.TOKEN: sample.token_start, Rows.PATCH: sample.patch_start, Rows.MERGED: first_merged},
        mine,
    )


def _spread(length: int, count: int) -> np.ndarray:
    if length == 0:
        return np.zeros(0, dtype=np.int64)
    return np.unique(np.linspace(0, length - 1, min(count, length)).round().astype(np.int64))


def _vision_context(patches: np.ndarray, sample: PlacedSample, batch: MicroBatch, limit: int) -> np.ndarray:
    if not len(patches):
        return patches
    # Frames hold whole windows, so a border of frames is one of windows too.
    borders = np.array(batch.vision.frames.borders) - sample.patch_start
    ends = borders[borders > patches[-1]]
    if batch.vision.windows is not None and ends[0] > limit:
        windows = np.array(batch.vision.windows.borders) - sample.patch_start
        ends = windows[windows > patches[-1]]
    return np.arange(ends[0]) if len(ends) and ends[0] <= 2 * limit else patches


def segments_of(sample: PlacedSample, batch: MicroBatch) -> dict[str, list[int]]:
    """Borders of the sample's windows and frames, from its first patch on."""
    found = {}
    for name, segments in (("windows", batch.vision.windows), ("frames", batch.vision.frames)):
        if segments is not None:
            borders = np.array(segments.borders) - sample.patch_start
            found[name] = borders[(borders >= 0) & (borders <= sample.patches)].tolist()
    return found


def text_hash(sample: PlacedSample, batch: MicroBatch) -> str:
    """Of token ids, positions and labels of a sample."""
    text, start, stop = batch.text, sample.token_start, sample.token_start + sample.tokens
    labelled = (text.label_rows >= start) & (text.label_rows < stop) & (text.label_weights > 0)
    state = Checksum()
    for part in (
        text.input_ids[start:stop],
        text.positions[:, start:stop],
        text.label_rows[labelled] - start,
        text.labels[labelled],
    ):
        state.update(part.to(torch.int64).contiguous().numpy().data)
    return state.hexdigest()


def pixel_hash(sample: PlacedSample, batch: MicroBatch) -> str | None:
    """Of the patches of a sample; None on ranks that do not have its pixels."""
    if batch.vision.pixels is None:
        return None
    pixels = batch.vision.pixels[sample.patch_start : sample.patch_start + sample.patches]
    if batch.vision.pixels_shared and not pixels.any():
        return None
    state = Checksum()
    # As bf16, so that runs in fp32 and in bf16 tell the same pixels by the same sum.
    state.update(pixels.to(torch.bfloat16).contiguous().view(torch.int16).numpy().data)
    return state.hexdigest()
