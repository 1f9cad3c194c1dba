"""Frames over context-parallel ranks: each once, evenly, and found again by the language model."""

import numpy as np
import pytest

from megatron_rb.data.sample import VisionGrid
from megatron_rb.models.frames import FrameShares, frame_order

GRIDS = [
    VisionGrid(3, 4, 6, "video", 0.5),
    VisionGrid(1, 2, 2, "image"),
    VisionGrid(1, 8, 8, "image"),
    VisionGrid(2, 6, 2, "video"),
]


def named_pixels() -> list[np.ndarray]:
    """Patches of all grids whose one value is their number in reading order."""
    ends = np.cumsum([grid.patches for grid in GRIDS])
    return [
        np.arange(end - grid.patches, end, dtype=np.float32)[:, None] for grid, end in zip(GRIDS, ends, strict=True)
    ]


@pytest.mark.parametrize("cp_size", [1, 2, 3, 5])
def test_every_frame_goes_to_the_rank_with_the_fewest_patches_so_far(cp_size):
    frames = [(grid.h * grid.w, place) for place, grid in enumerate(g for g in GRIDS for _ in range(g.t))]
    loads, expected = [0] * cp_size, [0] * len(frames)
    for patches, place in sorted(frames, key=lambda frame: -frame[0]):
        expected[place] = loads.index(min(loads))
        loads[expected[place]] += patches
    shares = FrameShares.of(GRIDS, cp_size)
    assert np.concatenate(shares.owners).tolist() == expected
    assert shares.most_patches() == max(loads)


@pytest.mark.parametrize("cp_size", [1, 2, 3, 5])
def test_ranks_together_have_the_patches_of_all_frames_once(cp_size):
    shares = FrameShares.of(GRIDS, cp_size)
    mine = [shares.pixels_of(rank, named_pixels()) for rank in range(cp_size)]
    for rank, arrays in enumerate(mine):
        assert [len(array) for array in arrays] == [grid.patches for grid in shares.grids_of(rank)]
    everything = np.concatenate([array for arrays in mine for array in arrays]).ravel()
    assert sorted(everything.tolist()) == list(range(sum(grid.patches for grid in GRIDS)))


@pytest.mark.parametrize("window", [0, 2])
@pytest.mark.parametrize("cp_size", [1, 2, 3])
def test_a_merged_token_is_found_in_the_rows_of_the_rank_that_computed_it(cp_size, window):
    """A stand-in for the ViT: a rank's merged row is the number of the first patch of its unit."""
    shares = FrameShares.of(GRIDS, cp_size)
    rows_of_rank = shares.padded_patches(0, 4) // 4
    everyone = np.full(cp_size * rows_of_rank, -1.0)
    for rank in range(cp_size):
        rows = rank * rows_of_rank
        for grid, array in zip(shares.grids_of(rank), shares.pixels_of(rank, named_pixels()), strict=True):
            for frame in np.split(array[::4, 0], grid.t):
                everyone[rows : rows + len(frame)] = frame[frame_order(grid.h, grid.w, 2, window)[0]]
                rows += len(frame)
    found = everyone[shares.merged_rows(2, window, rows_of_rank)]
    assert found.tolist() == np.concatenate(named_pixels())[::4, 0].tolist()


def test_a_batch_without_pictures_has_one_padded_row_at_least():
    shares = FrameShares.of([], 2)
    assert (shares.most_patches(), shares.padded_patches(0, 4)) == (0, 4)
    assert shares.grids_of(1) == [] and shares.pixels_of(1, []) == [] and len(shares.merged_rows(2, 0, 1)) == 0


@pytest.mark.parametrize("cp_size", [1, 2, 3, 5])
@pytest.mark.parametrize("wanted", [0, 30, 97, 400])
def test_padded_rows_hold_the_rank_with_the_most_and_the_share_of_what_is_wanted(cp_size, wanted):
    shares = FrameShares.of(GRIDS, cp_size)
    padded = shares.padded_patches(wanted, 8)
    assert padded % 8 == 0 and padded >= shares.most_patches() and padded * cp_size >= wanted


def test_without_windows_a_frame_is_read_from_its_first_unit_to_its_last():
    order, lengths = frame_order(4, 6, 2, window=0)
    assert order.tolist() == [0, 1, 2, 3, 4, 5] and lengths == ()


def test_an_order_that_many_frames_share_cannot_be_written_to():
    order, _ = frame_order(4, 6, 2, window=2)
    with pytest.raises(ValueError, match="read-only"):
        order[0] = 1


def test_frames_of_a_video_are_shared_and_none_is_cut():
    grids = [VisionGrid(5, 4, 6, "video", 0.5), VisionGrid(1, 8, 8, "image"), VisionGrid(1, 2, 2, "image")]
    shares = FrameShares.of(grids, 2)
    loads = [sum(grid.patches for grid in shares.grids_of(rank)) for rank in range(2)]
    # The image of 64 beside three frames of 24, one more frame for either, and the 4 patches for the lighter one.
    assert loads == [64 + 24 + 4, 4 * 24] and shares.most_patches() == 96
    assert all((grid.h, grid.w) in {(4, 6), (8, 8), (2, 2)} for rank in range(2) for grid in shares.grids_of(rank))
    pixels = [np.arange(grid.patches, dtype=np.float32)[:, None] for grid in grids]
    taken = [np.concatenate(shares.pixels_of(rank, pixels)) for rank in range(2)]
    assert sorted(np.concatenate(taken).ravel().tolist()) == sorted(np.concatenate(pixels).ravel().tolist())


def test_a_rank_above_its_share_of_a_bucket_is_padded_in_few_steps():
    shares = FrameShares.of([VisionGrid(1, 8, 8, "image"), VisionGrid(1, 4, 4, "image")], 2)
    assert shares.padded_patches(0, 4) == 64
    assert shares.padded_patches(200, 4) == 100
    # The share is 40 and its steps are 5: 65, and a multiple of 4 above it.
    assert shares.padded_patches(80, 4) == 68
