"""How a row names its media, and how it wants them shown."""

import base64
from pathlib import Path

import pytest

from megatron_rb.data.conversation import MediaRef
from megatron_rb.data.media_keys import OPTIONS
from megatron_rb.data.media_options import MediaOptions
from megatron_rb.data.problems import BadSample
from megatron_rb.data.rows import parse_line, parse_row

PICTURE = b"not looked at here"
URI = "data:image/png;base64," + base64.b64encode(PICTURE).decode()


def _row(part=None, text="<image>", **keys) -> dict:
    content = text if part is None else [part]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "x"}], **keys}


def _media(row: dict) -> tuple[MediaRef, ...]:
    return parse_row(row, "x", Path("/media")).media


WISHES = {
    "min_pixels": 3136,
    "max_pixels": 50176,
    "total_pixels": 200704,
    "resized_height": 56,
    "resized_width": 84,
    "nframes": 4,
    "min_frames": 2,
    "max_frames": 8,
    "video_start": 1.5,
    "video_end": 3,
    "sample_fps": 4,
    "raw_fps": 30,
}
WANTED = MediaOptions(
    min_pixels=3136,
    max_pixels=50176,
    total_pixels=200704,
    resized_height=56,
    resized_width=84,
    nframes=4,
    min_frames=2,
    max_frames=8,
    start=1.5,
    end=3.0,
    sample_fps=4.0,
    raw_fps=30.0,
)


@pytest.mark.parametrize(
    "row",
    [
        _row({"type": "video", "video": "a.mp4", **WISHES}),
        _row({"video": "a.mp4", **WISHES}),
        _row(text="<video>", video="a.mp4", **WISHES),
        _row(text="<video>", videos=["a.mp4"], chat_template_kwargs=WISHES),
        _row({"type": "video", "video": "a.mp4", "nframes": 4}, **(WISHES | {"nframes": None, "fps": 2})),
    ],
)
def test_every_wish_of_part_or_row_arrives(row):
    assert _media(row)[0].options == WANTED


def test_no_wish_was_forgotten():
    assert OPTIONS.keys() == WISHES.keys() | {"fps"}


def test_a_picture_obeys_the_keys_for_its_size():
    (ref,) = _media(_row(image="a.png", max_pixels=1024, fps=2))
    assert ref.options == MediaOptions(max_pixels=1024)


def test_videos_of_a_row_may_have_wishes_of_their_own():
    refs = _media(_row(text="<video><video>", videos=["a", "b"], fps=[1, 2], video_start=[0, 5]))
    assert [(ref.options.fps, ref.options.start) for ref in refs] == [(1, 0), (2, 5)]


def test_the_rate_of_given_frames_is_the_sampled_one():
    (ref,) = _media(_row({"type": "video", "video": ["a", "b"], "fps": 2, "sample_fps": 4}))
    assert ref.fps == 4


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ('"fps": 1e400', "fps is inf; it must be a number from"),
        ('"fps": 1e-300', "fps is 1e-300"),
        ('"fps": NaN', "fps is nan"),
        ('"fps": true', "fps is True"),
        ('"nframes": 2.5', "nframes is 2.5; it must be a whole number"),
        ('"max_pixels": "big"', "max_pixels is 'big'"),
        ('"video_start": -1', "video_start is -1"),
        ('"fps": 1, "nframes": 4', "fps 1 and nframes 4 contradict each other"),
        ('"video_start": 3, "video_end": 3', "video_start 3 and video_end 3 contradict"),
        ('"resized_height": 28', "resized_height 28 and resized_width None"),
        ('"min_pixels": 9, "max_pixels": 8', "contradict each other: max_pixels must be above"),
        ('"chat_template_kwargs": {"enable_thinking": true}', "chat_template_kwargs holds .'enable_thinking'."),
    ],
)
def test_wishes_that_cannot_be_meant_refuse_the_row(wishes, message):
    turns = '[{"role": "user", "content": "<video>"}, {"role": "assistant", "content": "x"}]'
    with pytest.raises(BadSample, match=message):
        parse_line(f'{{"video": "a.mp4", {wishes}, "messages": {turns}}}'.encode(), "x", Path("/media"))


@pytest.mark.parametrize(
    "row",
    [
        _row(image=URI),
        _row(images=[URI]),
        _row(image={"path": URI}),
        _row({"type": "image", "image": URI}),
        _row({"type": "image_url", "image_url": {"url": URI}}),
    ],
)
def test_a_data_uri_is_the_picture_itself(row):
    (ref,) = _media(row)
    assert ref.inline == PICTURE
    assert ref.source.startswith("inline:") and len(ref.source) < 30


@pytest.mark.parametrize(
    "row",
    [
        _row(image={"path": "a.png"}),
        _row(images=[{"bytes": None, "path": "a.png"}]),
        _row(image="a.png"),
        _row({"type": "image", "path": "a.png"}),
        _row({"type": "image_url", "value": "a.png"}),
        _row({"image_url": "a.png"}),
        _row({"type": "image"}, image="a.png"),
    ],
)
def test_a_file_may_be_named_in_several_ways(row):
    assert _media(row) == (MediaRef("image", "/media/a.png"),)


@pytest.mark.parametrize("nothing", [None, "", [], [None], [""], {"bytes": None, "path": None}])
def test_a_text_row_may_have_an_empty_picture(nothing):
    assert _media(_row(text="Hi", image=nothing, videos=nothing)) == ()


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("https://example.com/a.jpg", "'https://example.com/a.jpg' is a URL and is not fetched; read are files"),
        ("s3://bucket/a.jpg", "is a URL"),
        ({"bytes": "aGk="}, "key 'bytes'"),
        ("data:image/png;base64,@@", "cannot be decoded"),
        ("data:text/plain,hi", "cannot be decoded"),
        ("a\0b", r"no file can be named image 'a\\x00b'"),
        ("x" * 300, r"no file can be named image 'x+'\.\.\. \(300 characters\)"),
        (["a.png", ""], "image 1 of 2 is empty"),
        (3, "give a path"),
    ],
)
def test_other_sources_refuse_the_row_in_one_short_line(item, message):
    with pytest.raises(BadSample, match=message) as caught:
        _media(_row(image=item))
    assert len(str(caught.value)) < 250 and "\n" not in str(caught.value)


def test_no_message_repeats_a_payload():
    with pytest.raises(BadSample) as caught:
        _media(_row(image=URI + "A" * 100_000 + "@"))
    assert len(str(caught.value)) < 250
