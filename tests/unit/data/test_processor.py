"""Sizes and values of patches against transformers."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as smart_resize_clip

from megatron_rb.data.processor import build_processor
from megatron_rb.data.resize import SizeRule, resized

SIDES = st.integers(1, 3000)
SIZES = [(28, 28), (37, 211), (224, 224), (480, 640), (641, 333), (9, 16)]


@settings(max_examples=300, deadline=None)
@given(SIDES, SIDES, st.sampled_from([28, 32]), st.sampled_from([(3136, 1003520), (65536, 131072), (1, 4096)]))
def test_image_size_is_that_of_transformers(height, width, factor, limits):
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(ValueError, match="200 times"):
            resized(height, width, SizeRule(factor, *limits))
        return
    expected = smart_resize(height, width, factor, *limits)
    assert resized(height, width, SizeRule(factor, *limits)) == tuple(max(factor, side) for side in expected)


@settings(max_examples=300, deadline=None)
@given(SIDES, SIDES, st.integers(2, 70), st.sampled_from([(131072, 786432), (4096, 25165824), (4096, 65536)]))
def test_clip_size_is_that_of_transformers(height, width, frames, limits):
    rule = SizeRule(32, *limits, clip=True)
    try:
        expected = smart_resize_clip(frames, height, width, 2, 32, *limits)
    except ValueError:
        with pytest.raises(ValueError, match="200 times"):
            resized(height, width, rule, frames, 2)
        return
    assert resized(height, width, rule, frames, 2) == expected


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_image_patches_are_those_of_transformers(height, width, folder, encoder):
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    expected = Qwen2VLImageProcessorPil.from_pretrained(folder)(images=[image], return_tensors="np")
    grid = encoder.processor.image_grid(height, width)
    assert [grid.t, grid.h, grid.w] == expected["image_grid_thw"][0].tolist()
    patches = encoder.processor.image_patches(image)
    assert patches.dtype == np.float32
    assert np.abs(patches - expected["pixel_values"]).max() <= 1e-6


def _reference_video(frames: list[np.ndarray], colours, patch: int) -> np.ndarray:
    """Patch by patch, in words: for every pair of frames, block and patch in the block; then channel, frame, rows."""
    rows = []
    height, width = frames[0].shape[:2]
    mean, std = np.float32(colours.mean), np.float32(colours.std)
    numbers = [((frame * np.float64(colours.scale)).astype(np.float32) - mean) / std for frame in frames]
    for pair in zip(numbers[::2], numbers[1::2], strict=True):
        for top in range(0, height, 2 * patch):
            for left in range(0, width, 2 * patch):
                for y, x in ((top, left), (top, left + patch), (top + patch, left), (top + patch, left + patch)):
                    cut = np.stack([frame[y : y + patch, x : x + patch] for frame in pair])
                    rows.append(cut.transpose(3, 0, 1, 2).reshape(-1))
    return np.stack(rows)


def test_video_patches_pair_frames_and_repeat_an_odd_last_one(encoder):
    processor = encoder.processor
    side = 4 * processor.patch_size
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, (side, side + side // 2, 3), dtype=np.uint8) for _ in range(3)]
    patches = processor.video_patches([Image.fromarray(frame) for frame in frames])
    grid = processor.video_grid(3, side, side + side // 2)
    assert (grid.t, grid.h, grid.w) == (2, 4, 6)
    expected = _reference_video([*frames, frames[-1]], processor.video_colours, processor.patch_size)
    assert np.array_equal(patches, expected)


def test_video_frames_are_resized_to_the_grid(encoder):
    frames = [Image.new("RGB", (300, 200), (number, 0, 0)) for number in range(4)]
    grid = encoder.processor.video_grid(4, 200, 300)
    assert encoder.processor.video_patches(frames).shape == (grid.patches, encoder.processor.patch_dim)


def test_nested_file_of_transformers_5_is_read(folder, shape, encoder, tmp_path):
    both = {
        "image_processor": json.loads((folder / "preprocessor_config.json").read_text()),
        "video_processor": json.loads((folder / "video_preprocessor_config.json").read_text()),
    }
    (tmp_path / "processor_config.json").write_text(json.dumps(both))
    assert build_processor(tmp_path, shape) == encoder.processor


def test_old_folder_has_one_file_for_images_and_videos(folder, shape, tmp_path):
    settings = {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": shape.vision.patch_size}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    processor = build_processor(tmp_path, shape)
    assert (processor.image_size.max_pixels, processor.video_size.min_pixels) == (12845056, 3136)


def test_configured_limits_replace_those_of_the_file(folder, shape):
    processor = build_processor(folder, shape, min_pixels=100 * 100, max_pixels=120 * 120)
    grid = processor.image_grid(1000, 1000)
    assert grid.patches * shape.vision.patch_size**2 <= 120 * 120
    assert processor.image_grid(10, 10).patches * shape.vision.patch_size**2 >= 100 * 100


def test_smallest_above_largest_is_an_error(folder, shape):
    with pytest.raises(ValueError, match="set data.min_pixels too"):
        build_processor(folder, shape, max_pixels=16)


def test_other_patch_size_than_the_model_is_an_error(folder, shape, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings | {"patch_size": 12}))
    with pytest.raises(ValueError, match="patch_size 12 but the model's config.json says"):
        build_processor(tmp_path, shape)


def test_missing_file_is_an_error(shape, tmp_path):
    with pytest.raises(ValueError, match="no preprocessor_config.json in"):
        build_processor(tmp_path, shape)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ([], r"preprocessor_config.json must hold fields in braces, got \[\]"),
        (None, "preprocessor_config.json must hold fields in braces, got None"),
        ({"size": 3}, "size must hold fields in braces, got 3"),
        ({"size": {"shortest_edge": "much"}}, "size.shortest_edge must be a whole number above 0, got 'much'"),
        ({"max_pixels": 2.5}, "max_pixels must be a whole number above 0, got 2.5"),
        ({"rescale_factor": "x"}, "rescale_factor must be a number above 0, got 'x'"),
        ({"image_mean": "a"}, "image_mean must be 3 numbers, one a channel, got 'a'"),
        ({"image_std": [1.0, 1.0]}, "image_std must be 3 numbers"),
    ],
)
def test_file_or_field_of_another_form_is_named_with_its_value(shape, tmp_path, content, sentence):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=sentence):
        build_processor(tmp_path, shape)
