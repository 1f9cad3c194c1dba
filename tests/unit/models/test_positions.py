"""Index arithmetic against transformers' own, and against loops that say what is meant."""

import numpy as np
import pytest
import torch
from transformers import vision_utils

from megatron_rb.checkpoint.hf.oracle import model_inputs
from megatron_rb.data.sample import VisionGrid
from megatron_rb.models.positions import interpolation_indices, mrope_positions, patch_positions, window_order
from megatron_rb.parity.samples import draw_samples
from megatron_rb.shapes.families import VideoTime
from megatron_rb.shapes.shape import shape_from_dict
from tests.parity.tiny_models import MODELS

GRIDS = [VisionGrid(1, 2, 2, "image"), VisionGrid(1, 6, 10, "image"), VisionGrid(3, 8, 4, "video", 0.5)]


def thw(grid: VisionGrid) -> torch.Tensor:
    return torch.tensor([[grid.t, grid.h, grid.w]])


def test_patches_of_a_merge_unit_are_neighbours():
    found = patch_positions(VisionGrid(2, 2, 4, "video"), merge=2)
    frame = [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (0, 3), (1, 2), (1, 3)]
    assert found.dtype == np.int32 and [tuple(row) for row in found.tolist()] == frame * 2


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_rows_and_columns_of_patches_are_those_of_transformers(grid):
    assert np.array_equal(patch_positions(grid, 2), vision_utils.get_vision_position_ids(thw(grid), 2).numpy())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("window", [1, 2, 3, 9])
def test_windows_are_those_of_transformers(grid, window):
    order, lengths = window_order(grid, merge=2, window=window)
    theirs, borders = vision_utils.get_vision_window_index(thw(grid), 2, window_size=window * 2 * 14, patch_size=14)
    assert order.tolist() == theirs.tolist()
    # transformers counts patches, and names a border once for every empty window.
    assert np.cumsum([0, *lengths]).tolist() == [border // 4 for border in torch.unique_consecutive(borders).tolist()]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("side", [4, 6])
def test_learned_positions_are_interpolated_as_in_transformers(grid, side):
    table = torch.randn(side * side, 5)
    index, weight = (torch.from_numpy(x) for x in interpolation_indices(patch_positions(grid, 2), grid, side))
    found = (table[index] * weight[:, :, None]).sum(1)
    theirs, theirs_weight = vision_utils.get_vision_interpolation_indices_and_weights(
        thw(grid), side, align_corners=True, spatial_merge_size=2
    )
    torch.testing.assert_close(found, (table[theirs] * theirs_weight[:, :, None]).sum(1))


@pytest.fixture(scope="module", params=list(MODELS))
def family(request):
    """transformers' model on the meta device, which has its rule of positions, and our shape of it."""
    make_config, model_class = MODELS[request.param]
    config = make_config(0)
    with torch.device("meta"):
        model = model_class(config)
    return model.model, shape_from_dict(config.to_dict())


@pytest.mark.parametrize("seed", range(3))
def test_positions_of_tokens_are_those_of_transformers(family, seed):
    model, shape = family
    for sample in draw_samples(shape, seed, scale=2):
        visual = np.isin(sample.input_ids, (shape.image_token_id, shape.video_token_id))
        rules = (shape.vision.spatial_merge_size, shape.vision.tokens_per_second)
        split = shape.traits.video_time is VideoTime.TEXT
        found = mrope_positions(visual, sample.grids, *rules, split_video_frames=split)
        inputs = {name: value for name, value in model_inputs(sample, shape).items() if "pixel" not in name}
        expected, _ = model.get_rope_index(**inputs)
        assert np.array_equal(found, expected[:, 0].numpy()), sample.sample_id


def tokens(*runs: tuple[bool, int]) -> np.ndarray:
    return np.concatenate([np.full(count, visual) for visual, count in runs])


def test_text_behind_a_picture_goes_on_above_its_longer_side():
    is_visual = tokens((False, 2), (True, 6), (False, 2))
    found = mrope_positions(is_visual, [VisionGrid(1, 4, 6, "image")], 2, 0.0, split_video_frames=False)
    assert found.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
    ]


@pytest.mark.parametrize(
    ("count", "grids", "message"),
    [
        (
            5,
            [VisionGrid(1, 4, 4, "image")],
            "tokens 1..5 do not match the images: 1 are left, the next image needs none",
        ),
        (3, [VisionGrid(1, 4, 4, "image")], "tokens 1..3 do not match the images: 3 are left, the next image needs 4"),
        (4, [VisionGrid(1, 4, 4, "image")] * 2, "more images than placeholders"),
    ],
)
def test_placeholders_that_do_not_match_the_pictures_are_refused(count, grids, message):
    with pytest.raises(ValueError, match=message):
        mrope_positions(tokens((False, 1), (True, count), (False, 1)), grids, 2, 0.0, split_video_frames=False)
