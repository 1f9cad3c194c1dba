"""Images and videos on disk."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.video_utils import VideoMetadata

from megatron_rb.data.conversation import MediaRef
from megatron_rb.data.frames import FrameRule, group_seconds, sample_file, sample_given, second_per_grid
from megatron_rb.data.media import MediaInfo, inspect_media, load_frames, load_image, load_picture, shown_size
from megatron_rb.data.problems import BadSample

QWEN3 = FrameRule(whole_patches=False, fps=2.0, min_frames=4, max_frames=16, temporal_patch_size=2)
QWEN2 = FrameRule(whole_patches=True, fps=2.0, min_frames=4, max_frames=16, temporal_patch_size=2)


def test_size_of_a_turned_photo_is_that_of_its_pixels(draw_image):
    exif = Image.Exif()
    exif[0x0112] = 6
    ref = MediaRef("image", draw_image("turned.jpg", 40, 30, exif=exif))
    info = inspect_media(ref, 1.0)
    assert (info.height, info.width) == (40, 30)
    assert load_image(ref, info).size == (30, 40)


def test_pictures_of_reports_are_those_that_the_model_was_shown(draw_image, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = draw_image("turned.jpg", 40, 30, exif=exif)
    assert shown_size(path) == load_picture(path).size == (30, 40)
    Image.fromarray(np.full((4, 4), 257 * 80, np.uint16)).save(tmp_path / "deep.png")
    assert load_picture(tmp_path / "deep.png").getpixel((1, 1)) == (80, 80, 80)


def test_transparency_becomes_white(tmp_path):
    path = tmp_path / "clear.png"
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(path)
    image = load_image(MediaRef("image", str(path)), MediaInfo(8, 8))
    assert image.mode == "RGB" and image.getpixel((3, 3)) == (255, 255, 255)


def test_gray_becomes_rgb(draw_image):
    assert load_image(MediaRef("image", draw_image("gray.png", 8, 9, mode="L")), MediaInfo(9, 8)).mode == "RGB"


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(BadSample, match="no file .*gone.png"):
        inspect_media(MediaRef("image", str(tmp_path / "gone.png")), 1.0)


def test_a_cut_off_file_has_a_header_but_does_not_decode(draw_image):
    path = draw_image("cut.png", 64, 64)
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[: len(content) // 2])
    ref = MediaRef("image", path)
    info = inspect_media(ref, 1.0)
    with pytest.raises(BadSample, match="cut.png does not decode"):
        load_image(ref, info)


def test_an_image_that_changed_is_refused(draw_image):
    ref = MediaRef("image", draw_image("a.png", 64, 32))
    with pytest.raises(BadSample, match="is 64 x 32, it was 32 x 32 when indexed"):
        load_image(ref, MediaInfo(32, 32))


def test_frames_of_a_folder_are_in_natural_order(tmp_path):
    (tmp_path / "clip").mkdir()
    for number in (10, 2, 1):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / "clip" / f"frame{number}.png")
    ref = MediaRef("video", str(tmp_path / "clip"))
    info = inspect_media(ref, 2.5)
    assert info == MediaInfo(8, 8, frames=3, fps=2.5, given_frames=True)
    assert [frame.getpixel((0, 0))[0] for frame in load_frames(ref, info, [0, 2])] == [1, 10]


def test_rate_of_frames_row_before_file_beside_before_default(draw_image, tmp_path):
    draw_image("clip/0.png", 8, 8)
    folder = str(tmp_path / "clip")
    (tmp_path / "clip.json").write_text(json.dumps({"fps": 5}))
    assert inspect_media(MediaRef("video", folder), 2.0).fps == 5
    assert inspect_media(MediaRef("video", folder, fps=3.0), 2.0).fps == 3


def test_frames_of_unequal_size_are_refused(draw_image):
    frames = (draw_image("0.png", 8, 8), draw_image("1.png", 8, 9))
    with pytest.raises(BadSample, match="2 different sizes"):
        inspect_media(MediaRef("video", frames), 2.0)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(BadSample, match="holds no frames"):
        inspect_media(MediaRef("video", str(tmp_path)), 2.0)


def test_given_frames_are_all_taken_until_there_are_too_many():
    assert sample_given(5, QWEN3) == [0, 1, 2, 3, 4]
    assert sample_given(61, QWEN3) == list(range(0, 61, 4))


def test_file_is_sampled_at_the_asked_rate():
    assert sample_file(90, 30.0, QWEN3) == [0, 18, 36, 53, 71, 89]
    assert sample_file(90, 30.0, QWEN2) == [0, 15, 30, 45, 60, 75]
    assert len(sample_file(30, 30.0, QWEN3)) == len(sample_file(30, 30.0, QWEN2)) == 4
    assert len(sample_file(9000, 30.0, QWEN3)) == len(sample_file(9000, 30.0, QWEN2)) == 16


@settings(deadline=None)
@given(st.integers(2, 4000), st.floats(1, 120), st.floats(0.2, 30))
def test_frames_of_a_file_are_those_of_transformers(total, fps, wanted):
    processor = Qwen3VLVideoProcessor(min_frames=4, max_frames=16)
    expected = processor.sample_frames(VideoMetadata(total_num_frames=total, fps=fps), fps=wanted).tolist()
    if len(expected) < 2:
        return
    assert sample_file(total, fps, replace(QWEN3, fps=wanted)) == expected


@pytest.mark.parametrize("rule", [QWEN3, QWEN2])
def test_one_frame_is_no_video(rule):
    with pytest.raises(BadSample, match="use it as an image"):
        sample_file(1, 30.0, rule)


def test_time_of_a_group_is_the_middle_of_its_frames():
    assert group_seconds([0, 10, 20], 10.0, 2) == [0.5, 2.0]
    assert second_per_grid([0, 15, 30, 45], 60, 30.0, 2) == 1.0


def test_video_file_is_read_by_pyav(tmp_path):
    av = pytest.importorskip("av")
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(20):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), number * 10, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    ref = MediaRef("video", str(path))
    info = inspect_media(ref, 2.0)
    assert info == MediaInfo(48, 64, frames=20, fps=10.0)
    shades = [np.asarray(frame).mean() for frame in load_frames(ref, info, [0, 10, 19])]
    assert shades == pytest.approx([0, 100, 190], abs=12)
    with pytest.raises(BadSample, match="ends before frame 99"):
        load_frames(ref, info, [0, 99])
    path.write_bytes(b"no video")
    with pytest.raises(BadSample, match="is not a readable video"):
        inspect_media(ref, 2.0)


def test_without_pyav_a_video_file_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "clip.mp4").write_bytes(b"")
    with pytest.raises(ValueError, match=r"needs PyAV: install megatron-rb\[video\]"):
        inspect_media(MediaRef("video", str(tmp_path / "clip.mp4")), 2.0)
