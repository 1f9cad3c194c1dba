"""Index arithmetic on the host: positions of patches, windows, interpolation indices, mRoPE positions.

Patches of a frame come in merge-block order: the `merge x merge` patches that become one token are neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from megatron_rb.data.sample import VisionGrid


def patch_positions(grid: VisionGrid, merge: int) -> np.ndarray:
    """Row and column of every patch of one image or video, int32 `[t * h * w, 2]`, in merge-block order."""
    rows, cols = np.meshgrid(np.arange(grid.h), np.arange(grid.w), indexing="ij")
    blocks = (grid.h // merge, merge, grid.w // merge, merge)
    frame = np.stack([x.reshape(blocks).swapaxes(1, 2).reshape(-1) for x in (rows, cols)], axis=-1)
    return np.tile(frame, (grid.t, 1)).astype(np.int32)


def window_order(grid: VisionGrid, merge: int, window: int) -> tuple[np.ndarray, list[int]]:
    """Order in which merged tokens stand when each attention window is contiguous.

    Args:
        window: side of a window in merged tokens.

    Returns:
        The permutation `[t * h * w / merge^2]` of the merged tokens of this grid, and each window's length.
    """
    height, width = grid.h // merge, grid.w // merge
    index = np.arange(grid.t * height * width).reshape(grid.t, height, width)
    order, lengths = [], []
    for frame in index:
        for top in range(0, height, window):
            for left in range(0, width, window):
                part = frame[top : top + window, left : left + window].reshape(-1)
                order.append(part)
                lengths.append(len(part))
    return np.concatenate(order), lengths


def interpolation_indices(positions: np.ndarray, grid: VisionGrid, side: int) -> tuple[np.ndarray, np.ndarray]:
    """The four entries of a learned `side x side` grid, and their weights, that make each patch's position embedding.

    Bilinear with aligned corners, in fp32 like transformers' vision tower.

    Returns:
        int32 `[patches, 4]` and float32 `[patches, 4]`.
    """
    corners, weights = [], []
    for axis, size in ((0, grid.h), (1, grid.w)):
        source = positions[:, axis].astype(np.float32) * np.float32(side - 1) / np.float32(max(size - 1, 1))
        low = np.floor(source)
        high_weight = (source - low).astype(np.float32)
        low = low.astype(np.int32)
        corners.append(np.stack([low, np.minimum(low + 1, side - 1)], axis=-1))
        weights.append(np.stack([1 - high_weight, high_weight], axis=-1))
    index = corners[0][:, :, None] * side + corners[1][:, None, :]
    weight = weights[0][:, :, None] * weights[1][:, None, :]
    return index.reshape(-1, 4).astype(np.int32), weight.reshape(-1, 4).astype(np.float32)


def mrope_positions(
    is_visual: np.ndarray, grids: Sequence[VisionGrid], merge: int, tokens_per_second: float, split_video_frames: bool
) -> np.ndarray:
    """Time, height and width position of every token of one sample.

    Args:
        is_visual: bool `[tokens]`, true at image and video placeholders.
        grids: images and videos in order of appearance.
        tokens_per_second: temporal positions per second of video; 0 = frames advance by one.
        split_video_frames: every temporal grid of a video is a segment of its own (Qwen3-VL).

    Returns:
        int32 `[3, tokens]`

    Raises:
        ValueError: the placeholders do not match the grids.
    """
    positions = np.empty((3, len(is_visual)), dtype=np.int32)
    segments = _segments(grids, split_video_frames)
    place, current = 0, 0
    borders = np.flatnonzero(np.diff(is_visual.astype(np.int8))) + 1
    for start, stop in zip([0, *borders], [*borders, len(is_visual)], strict=True):
        if start == stop:
            continue
        if not is_visual[start]:
            positions[:, start:stop] = current + np.arange(stop - start)
            current += stop - start
            continue
        place = start
        while place < stop:
            grid = next(segments, None)
            count = grid.patches // merge**2 if grid else 0
            if grid is None or place + count > stop:
                raise ValueError(
                    f"placeholders of tokens {start}..{stop - 1} do not match the images: {stop - place} are left, "
                    f"the next image needs {count if grid else 'none'}"
                )
            positions[:, place : place + count] = current + _grid_positions(grid, merge, tokens_per_second)
            place += count
            current += max(grid.h, grid.w) // merge
    if next(segments, None) is not None:
        raise ValueError("the sample has more images than placeholders")
    return positions


def _segments(grids: Sequence[VisionGrid], split_video_frames: bool) -> Iterator[VisionGrid]:
    for grid in grids:
        if split_video_frames and grid.kind == "video":
            yield from [VisionGrid(1, grid.h, grid.w, "video")] * grid.t
        else:
            yield grid


def _grid_positions(grid: VisionGrid, merge: int, tokens_per_second: float) -> np.ndarray:
    times = np.arange(grid.t)
    if grid.kind == "video" and tokens_per_second and grid.second_per_grid:
        times = (times * np.float32(tokens_per_second * grid.second_per_grid)).astype(np.int64)
    axes = np.meshgrid(times, np.arange(grid.h // merge), np.arange(grid.w // merge), indexing="ij")
    return np.stack(axes).reshape(3, -1).astype(np.int32)
