"""ms-swift's `objects` in the words of both model families."""

from dataclasses import replace

import pytest

from megatron_rb.data.boxes import BoxWriter
from megatron_rb.data.conversation import BoxRef, NameRef, Turn
from megatron_rb.data.problems import BadSample
from megatron_rb.data.rows import parse_row
from megatron_rb.data.sample import IGNORED


@pytest.fixture
def learn(encoder, draw_image, tmp_path):
    """What is learned of a picture of 300 x 120 pixels with some objects."""
    paths = [draw_image("a.png", 300, 120), draw_image("b.png", 64, 64)]

    def encode(objects: dict, answer: str = "<bbox>", box_text: str = "list", images: int = 2) -> str:
        turns = [{"role": "user", "content": "<image>" * images}, {"role": "assistant", "content": answer}]
        row = {"images": paths[:images], "objects": objects, "messages": turns}
        conversation = parse_row(row, "x", tmp_path)
        changed = replace(encoder, box_text=box_text)
        sample = changed.encode(conversation, changed.inspect(conversation))
        return changed.tokenizer.decode(sample.labels[sample.labels != IGNORED]).removesuffix("<|im_end|>\n")

    return encode


def _expected(encoder, box: list[float], width: int, height: int) -> str:
    grid, side = encoder.processor.image_grid(height, width), encoder.processor.patch_size
    wide, high = (1000, 1000) if encoder.processor.family.boxes_in_thousandths else (grid.w * side, grid.h * side)
    return str([round(value / (height if n % 2 else width) * (high if n % 2 else wide)) for n, value in enumerate(box)])


def test_a_box_is_scaled_to_what_the_model_sees_or_to_thousandths(learn, encoder):
    said = learn({"bbox": [[30, 60, 150, 120]]})
    assert said == _expected(encoder, [30, 60, 150, 120], 300, 120)
    assert (
        said == "[100, 500, 500, 1000]"
        if encoder.processor.family.boxes_in_thousandths
        else said != "[30, 60, 150, 120]"
    )


def test_a_box_belongs_to_the_picture_that_is_named(learn, encoder):
    assert learn({"bbox": [[32, 64]], "image_id": [1]}) == _expected(encoder, [32, 64], 64, 64)


def test_shares_of_the_picture_give_the_same_box(learn):
    assert learn({"bbox": [[0.1, 0.5, 0.5, 1]], "bbox_type": "norm1"}) == learn({"bbox": [[30, 60, 150, 120]]})


def test_corners_are_put_in_order(learn):
    assert learn({"bbox": [[150, 120, 30, 60]]}) == learn({"bbox": [[30, 60, 150, 120]]})


def test_names_stand_for_their_markers(learn):
    assert learn({"ref": ["cube", "hand"]}, "<ref-object> and <ref-object>") == "cube and hand"


def test_qwens_box_tokens_need_a_tokenizer_that_has_them(learn):
    with pytest.raises(BadSample, match="which the tokenizer lacks; set data.box_text=list"):
        learn({"bbox": [[1, 2]]}, box_text="tokens")


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        ({"bbox": [[1, 2], [3, 4]]}, r"1 <bbox> markers but objects.bbox holds 2"),
        ({"bbox": [[1, 2]], "ref": ["cube"]}, "0 <ref-object> markers but objects.ref holds 1"),
        ({"bbox": [[1, 2, 3]]}, r"\[1, 2, 3\]; give \[x, y\]"),
        ({"bbox": [[1, None]]}, "every coordinate must be a number"),
        ({"bbox": [[1, float("nan")]]}, "objects.bbox is nan"),
        ({"bbox": [[1, 2]], "image_id": [2]}, "a box of image 2, the row has 2 images"),
        ({"bbox": [[1, 2]], "bbox_type": "percent"}, "bbox_type is 'percent'"),
        ({"bbox": [[1, 2]], "colour": ["red"]}, "objects is .*; read is an object of ref, bbox"),
        ([1, 2], r"objects is \[1, 2\]"),
    ],
)
def test_other_objects_refuse_the_row(learn, objects, message):
    with pytest.raises(BadSample, match=message):
        learn(objects)


def test_a_marker_without_objects_is_text(learn):
    assert learn(None, "write <bbox>") == "write <bbox>"


def test_the_tokens_are_written_as_ms_swift_writes_them():
    turn = Turn("assistant", (NameRef("cube"), BoxRef((30, 60, 150, 120), 0)))
    (written,) = BoxWriter(thousandths=True).written([turn], [(300, 120)], [(308, 112)])
    assert "".join(written.parts) == (
        "<|object_ref_start|>cube<|object_ref_end|><|box_start|>(100,500),(500,1000)<|box_end|>"
    )
