"""Sizes that a row asks for: those of Qwen's own tool, worked out by transformers' `smart_resize`."""

import pytest
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from megatron_rb.data.media_options import NO_OPTIONS, MediaOptions
from megatron_rb.data.resize import SizeRule, image_target, resized, video_target

FACTOR = 32
IMAGE = SizeRule(FACTOR, min_pixels=64 * 64, max_pixels=1024 * 1024)
FRAME = SizeRule(FACTOR, min_pixels=64 * 64, max_pixels=512 * 512)
CLIP = SizeRule(FACTOR, min_pixels=128 * 1024, max_pixels=768 * 1024, clip=True)


@pytest.mark.parametrize(
    ("options", "least", "most"),
    [
        (NO_OPTIONS, 64 * 64, 1024 * 1024),
        (MediaOptions(max_pixels=200_000), 64 * 64, 200_000),
        (MediaOptions(min_pixels=500_000), 500_000, 1024 * 1024),
        (MediaOptions(min_pixels=300_000, max_pixels=400_000), 300_000, 400_000),
        (MediaOptions(min_pixels=2_000_000), 2_000_000, 2_000_000),
        (MediaOptions(max_pixels=2048), 2048, 2048),
    ],
)
def test_limits_of_an_image(options: MediaOptions, least: int, most: int):
    wanted = smart_resize(480, 640, factor=FACTOR, min_pixels=least, max_pixels=most)
    assert image_target(480, 640, IMAGE, options) == wanted


@pytest.mark.parametrize("target", [image_target, video_target])
def test_a_stated_size_is_rounded_to_whole_blocks(target):
    options = MediaOptions(resized_height=280, resized_width=420)
    more = () if target is image_target else (8, 2)
    assert target(480, 640, IMAGE, *more, options) == smart_resize(280, 420, factor=FACTOR) == (288, 416)


def test_a_video_without_wishes_has_the_processors_size():
    assert video_target(480, 640, CLIP, 8, 2, NO_OPTIONS) == resized(480, 640, CLIP, 8, 2)


@pytest.mark.parametrize("rule", [FRAME, CLIP])
@pytest.mark.parametrize(
    ("options", "most"),
    [
        (MediaOptions(max_pixels=20_000), 20_000),
        (MediaOptions(total_pixels=1_000_000, min_pixels=4096), 1_000_000 * 2 // 20),
        (MediaOptions(total_pixels=1_000_000, max_pixels=30_000, min_pixels=4096), 30_000),
        (MediaOptions(total_pixels=1_000, min_pixels=40_000), int(40_000 * 1.05)),
    ],
)
def test_limits_of_the_frames_of_a_video(rule: SizeRule, options: MediaOptions, most: int):
    own = rule.max_pixels // 20 if rule.clip else rule.max_pixels
    least = options.min_pixels or (128 * FACTOR**2 if rule.clip else rule.min_pixels)
    most = min(most, own)
    wanted = smart_resize(480, 640, factor=FACTOR, min_pixels=min(least, most), max_pixels=most)
    assert video_target(480, 640, rule, 20, 2, options) == wanted


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (MediaOptions(resized_height=280), "resized_height and resized_width belong together"),
        (MediaOptions(min_pixels=9000, max_pixels=8000), "min_pixels 9000 is above max_pixels 8000"),
    ],
)
def test_wishes_that_contradict_each_other_are_refused(options: MediaOptions, words: str):
    with pytest.raises(ValueError, match=words):
        image_target(480, 640, IMAGE, options)
