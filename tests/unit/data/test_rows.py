"""Spellings of a row, and what is wrong with bad ones."""

import json
from pathlib import Path

import pytest

from megatron_rb.data.conversation import MediaRef
from megatron_rb.data.media_options import MediaOptions
from megatron_rb.data.problems import BadSample
from megatron_rb.data.rows import parse_line, parse_row

ROOT = Path("/media")
ANSWER = {"from": "gpt", "value": "Here."}


def _talk(text: str, **fields) -> dict:
    return {"conversations": [{"from": "human", "value": text}, ANSWER], **fields}


def _parts(row: dict) -> tuple:
    return parse_row(row, "x", ROOT).turns[0].parts


def test_markers_stand_for_the_media_in_order():
    row = _talk("<image>\na <video> b<image>", images=["1.png", "/abs/2.png"], video="clip", fps=4)
    assert _parts(row) == (
        MediaRef("image", "/media/1.png"),
        "\na ",
        MediaRef("video", "/media/clip", 4.0, MediaOptions(fps=4.0)),
        " b",
        MediaRef("image", "/abs/2.png"),
    )


@pytest.mark.parametrize("fields", [{"image": "a.png"}, {"image": ["a.png"]}, {"images": ["a.png"]}])
def test_one_image_may_be_a_name_or_a_list(fields):
    assert _parts(_talk("<image>", **fields)) == (MediaRef("image", "/media/a.png"),)


def test_a_list_of_frames_is_one_video():
    row = _talk("<video>", videos=[["0.png", "1.png"]], video_fps=[2])
    assert _parts(row) == (MediaRef("video", ("/media/0.png", "/media/1.png"), 2.0, MediaOptions(fps=2.0)),)


def test_openai_parts_bring_their_own_paths():
    content = [
        {"type": "image", "image": "a.png"},
        {"type": "image_url", "image_url": {"url": "file:///b.png"}},
        {"type": "video", "video": "clip.mp4", "fps": 1},
        {"type": "text", "text": "Where?"},
    ]
    row = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "Here."}]}
    assert _parts(row) == (
        MediaRef("image", "/media/a.png"),
        MediaRef("image", "/b.png"),
        MediaRef("video", "/media/clip.mp4", 1.0, MediaOptions(fps=1.0)),
        "Where?",
    )


def test_openai_parts_may_take_their_paths_from_the_row():
    row = {
        "images": ["a.png"],
        "messages": [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "Here."}],
    }
    assert _parts(row) == (MediaRef("image", "/media/a.png"),)


def test_a_row_without_id_gets_the_default():
    assert parse_row(_talk("a"), "file:3", ROOT).sample_id == "file:3"
    assert parse_row(_talk("a", id=7), "file:3", ROOT).sample_id == "7"


@pytest.mark.parametrize(
    ("row", "problem", "message"),
    [
        (_talk("<image>", image=["a", "b"]), "wrong marker count", "1 <image> markers but the row names 2 images"),
        (_talk("<image>"), "wrong marker count", "1 <image> markers but the row names 0 images"),
        (_talk("a", video="v"), "wrong marker count", "0 <video> markers but the row names 1 videos"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "no assistant turn", "nothing to learn"),
        ({"id": 1}, "no conversation", "the row has no turns"),
        (_talk(["a"]), "no conversation", "content part 'a'"),
        ({"conversations": [{"from": "robot", "value": "a"}]}, "unknown role", "turn 0 is from 'robot'"),
        ({"conversations": [ANSWER, {"from": "system", "value": "a"}]}, "unknown role", "only the first"),
        (_talk("<image>", image=[3]), "missing media", "image 3 is not a path"),
        (_talk("<video>", video="v", fps=0), "bad fps", "fps is 0; it must be a number from"),
        (_talk("a", points={"points": [[1001, 2]]}), "point outside", "1001, 2"),
        (_talk("a", points={"red cube": [[3, -1, 0.5]]}), "point outside", "3, -1"),
        (
            _talk("a", points={"points": [[640, 2]], "frame": "pixels", "size": [640, 480]}),
            "point outside",
            "lies outside 640 x 480",
        ),
        (_talk("a", points={"points": [[1, 2]], "frame": "pixels"}), "bad points", r"give \[width, height\]"),
        (_talk("a", points={"points": [[1, 2]], "frame": "percent"}), "bad points", "use '0-1000' or 'pixels'"),
        (_talk("a", points={"points": [[1]]}), "bad points", "two or three numbers"),
        (_talk("a", points={"points": [[float("nan"), 1]]}), "point outside", "nan"),
    ],
)
def test_bad_rows_are_refused_with_a_reason(row, problem, message):
    with pytest.raises(BadSample, match=message) as caught:
        parse_row(row, "x", ROOT)
    assert caught.value.problem == problem


def test_points_inside_are_accepted():
    parse_row(_talk("a", points={"points": [[0, 1000]], "frame": "0-1000"}), "x", ROOT)
    parse_row(_talk("a", points={"points": [[639.5, 0]], "frame": "pixels", "size": [640, 480]}), "x", ROOT)
    parse_row(_talk("a", points={"end effector": [[5, 6, 1.25]]}), "x", ROOT)


@pytest.mark.parametrize(
    ("line", "problem"),
    [(b'{"id": 1', "not JSON"), (b"[1]\n", "not an object"), (b"null", "not an object"), (b"\xff\xfe", "not JSON")],
)
def test_a_line_that_is_no_object_is_refused(line, problem):
    with pytest.raises(BadSample) as caught:
        parse_line(line, "x", ROOT)
    assert caught.value.problem == problem


def test_a_line_is_a_row():
    assert parse_line(json.dumps(_talk("a", id="q")).encode(), "x", ROOT).sample_id == "q"
