"""A row that says one thing twice, and differently, is refused with both."""

import json
from pathlib import Path

import pytest

from megatron_rb.data.boxes import BoxWriter
from megatron_rb.data.conversation import BoxRef, Turn
from megatron_rb.data.problems import BadSample
from megatron_rb.data.rows import parse_line

ANSWER = '{"role": "assistant", "content": "a"}'


def row(first: str, more: str = "") -> bytes:
    return f'{{"messages": [{first}, {ANSWER}]{more}}}'.encode()


ASKED = '{"role": "user", "content": "q"}'
PART = '{"role": "user", "content": [%s, {"type": "text", "text": "q"}]}'


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (row('{"from": "human", "role": "assistant", "content": "q"}'), "turn 0 is from 'human' and 'assistant'"),
        (row('{"role": "user", "content": "q", "value": "v"}'), "the turn says 'content': 'q' and 'value': 'v'"),
        (row(ASKED, ', "system": "one", "system_prompt": "two"'), "the row says 'system': 'one' and 'system_prompt'"),
        (row(ASKED, ', "fps": 4, "video_fps": 1'), "the row says 'fps': 4 and 'video_fps': 1"),
        (row(PART % '{"type": "image", "image": "a.png", "text": "also"}'), "a part of type image says text 'also'"),
        (row(PART % '{"type": "image", "image": "a.png", "path": "b.png"}'), "'image': 'a.png' and 'path': 'b.png'"),
        (row(PART % '{"type": "text", "text": "x", "value": "y"}'), "'text': 'x' and 'value': 'y'"),
        (row('{"role": "user", "content": "q", "loss": false, "loss": true}'), "the key 'loss' stands twice"),
        (row(ASKED, ', "query": "q", "response": "r"'), "turns in 'messages' and in 'query' with 'response'"),
        (row(ASKED, ', "instruction": "q", "output": "r"'), "turns in 'messages' and in 'instruction' with 'output'"),
        (row(ASKED, ', "history": [["a", "b"]]'), "turns in 'messages' and in 'history'"),
        (row(ASKED, ', "messages": []'), "the key 'messages' stands twice"),
        (row(ASKED, ', "loss": false'), "the row's key 'loss' is a mark of what is learned"),
        (row('{"role": "user", "content": "q", "train_on_turn": false}'), "the turn's key 'train_on_turn' is a mark"),
    ],
)
def test_a_contradiction_refuses_the_row(line: bytes, words: str):
    with pytest.raises(BadSample) as refused:
        parse_line(line, "id", Path())
    assert words in str(refused.value)


@pytest.mark.parametrize(
    "line",
    [
        row('{"from": "human", "role": "user", "content": "q", "value": "q"}'),
        row(ASKED, ', "system": "", "system_prompt": "two"'),
        row(ASKED, ', "fps": 2, "video_fps": 2, "fps": 2'),
    ],
)
def test_the_same_said_twice_is_no_contradiction(line: bytes):
    assert len(parse_line(line, "id", Path()).turns) >= 2


@pytest.mark.parametrize(
    ("corners", "shares"), [((1, 2, 3000, 20), False), ((-1, 2, 10, 20), False), ((1, 2, 30, 20), True)]
)
def test_a_box_outside_its_picture_is_refused(corners: tuple[float, ...], shares: bool):
    turn = Turn("assistant", (BoxRef(corners, 0, shares),))
    with pytest.raises(BadSample, match=f"objects has the box {corners[0]}, .* outside the picture"):
        BoxWriter(True).written([turn], [(96, 64)], [(96, 64)])


def test_a_box_on_the_border_is_inside():
    turn = Turn("assistant", (BoxRef((0, 0, 96, 64), 0),))
    assert json.loads(BoxWriter(True, "list").written([turn], [(96, 64)], [(96, 64)])[0].parts[0]) == [0, 0, 1000, 1000]
