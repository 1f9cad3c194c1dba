"""Conversations become the ids of transformers' processors."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from transformers.video_utils import VideoMetadata

from megatron_rb.data.problems import BadSample
from megatron_rb.data.prompt import CHATML, ChatTemplate
from megatron_rb.data.rows import parse_row
from megatron_rb.data.sample import IGNORED


def _encode(encoder, row, root):
    conversation = parse_row(row, "row", root)
    infos = encoder.inspect(conversation)
    return encoder.encode(conversation, infos), conversation, infos


def _learned(encoder, sample) -> str:
    return encoder.tokenizer.decode(sample.labels[sample.labels != IGNORED])


def test_ids_and_pixels_with_images_are_those_of_the_processor(encoder, reference, draw_image, tmp_path):
    paths = [draw_image("a.png", 61, 90), draw_image("b.png", 300, 120)]
    sample, conversation, infos = _encode(
        encoder,
        {
            "image": paths,
            "conversations": [
                {"from": "human", "value": "<image>\nWhere is the red cube?\n<image>"},
                {"from": "gpt", "value": "[(512, 340)]"},
                {"from": "human", "value": "And the gripper?"},
                {"from": "gpt", "value": "[(12, 34)]\nAbove the table."},
            ],
        },
        tmp_path,
    )
    messages = [
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": "\nWhere is the red cube?\n"}, {"type": "image"}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "[(512, 340)]"}]},
        {"role": "user", "content": [{"type": "text", "text": "And the gripper?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "[(12, 34)]\nAbove the table."}]},
    ]
    text = reference().render(messages, tokenize=False)
    expected = reference().process(text=[text], images=[Image.open(path) for path in paths], return_tensors="np")
    assert sample.input_ids.tolist() == expected["input_ids"][0].tolist()
    assert [[grid.t, grid.h, grid.w] for grid in sample.grids] == expected["image_grid_thw"].tolist()
    patches = np.concatenate(encoder.pixels(conversation, infos))
    assert np.abs(patches - expected["pixel_values"]).max() <= 1e-6
    assert sample.input_ids.dtype == sample.labels.dtype == np.int32


@pytest.mark.parametrize("count", [4, 5])
def test_ids_with_a_video_are_those_of_the_processor(count, encoder, reference, draw_image, tmp_path, family):
    frames = [draw_image(f"clip/{number:02d}.png", 64, 96) for number in range(count)]
    row = {
        "videos": [frames],
        "fps": 3.0,
        "conversations": [
            {"from": "human", "value": "The arm <video>opens?"},
            {"from": "gpt", "value": "its gripper"},
        ],
    }
    sample, conversation, infos = _encode(encoder, row, tmp_path)
    (grid,) = sample.grids
    metadata = VideoMetadata(total_num_frames=count, fps=3.0, frames_indices=list(range(count)))
    messages = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "The arm "}, {"type": "video"}, {"type": "text", "text": "opens?"}],
        },
        {"role": "assistant", "content": "its gripper"},
    ]
    processor = reference([(grid.t, grid.h, grid.w)], [metadata])
    text = processor.render(messages, tokenize=False)
    expected = processor.process(text=[text], videos=[np.zeros((count, 8, 8, 3), np.uint8)])
    assert sample.input_ids.tolist() == list(expected["input_ids"][0])
    assert grid.t == -(-count // 2)
    if family == "qwen2_5_vl":
        assert grid.second_per_grid == pytest.approx(expected["second_per_grid_ts"][0])
    else:
        assert grid.second_per_grid == 0
    (patches,) = encoder.pixels(conversation, infos)
    assert patches.shape == (grid.patches, encoder.processor.patch_dim)


def test_only_what_the_assistant_writes_is_learned(encoder, tmp_path):
    row = {
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "Where?"},
            {"from": "gpt", "value": "Here."},
            {"from": "human", "value": "Who?"},
            {"from": "gpt", "value": "You."},
            {"from": "human", "value": "Bye."},
        ]
    }
    sample, _, _ = _encode(encoder, row, tmp_path)
    assert _learned(encoder, sample) == "Here.<|im_end|>\nYou.<|im_end|>\n"
    whole = encoder.tokenizer.decode(sample.input_ids)
    assert whole.startswith("<|im_start|>system\nBe brief.<|im_end|>\n") and whole.endswith("Bye.<|im_end|>\n")


def test_placeholders_are_never_learned(encoder, draw_image, tmp_path):
    row = {
        "image": draw_image("a.png", 64, 64),
        "messages": [{"role": "user", "content": "Draw."}, {"role": "assistant", "content": "<image> done"}],
    }
    sample, _, _ = _encode(encoder, row, tmp_path)
    assert "image_pad" not in _learned(encoder, sample)


def test_default_system_prompt_stands_in_for_a_missing_one(encoder, tmp_path):
    spoken = replace(encoder, template=replace(encoder.template, system_prompt="Point."))
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    with_default, _, _ = _encode(spoken, {"messages": turns}, tmp_path)
    own, _, _ = _encode(spoken, {"messages": [{"role": "system", "content": "Own."}, *turns]}, tmp_path)
    assert encoder.tokenizer.decode(with_default.input_ids).startswith("<|im_start|>system\nPoint.<|im_end|>")
    assert encoder.tokenizer.decode(own.input_ids).startswith("<|im_start|>system\nOwn.<|im_end|>")


def test_prompt_ends_where_the_last_answer_begins(encoder, draw_image, tmp_path):
    row = {
        "image": [draw_image("a.png", 64, 64), draw_image("b.png", 64, 64)],
        "conversations": [
            {"from": "human", "value": "<image>Where?"},
            {"from": "gpt", "value": "Here."},
            {"from": "human", "value": "<image>And now?"},
            {"from": "gpt", "value": "There."},
        ],
    }
    sample, conversation, infos = _encode(encoder, row, tmp_path)
    prompt = encoder.encode_prompt(conversation, infos)
    assert len(prompt.grids) == 2
    assert (prompt.labels == IGNORED).all()
    assert prompt.input_ids.tolist() == sample.input_ids[: len(prompt.input_ids)].tolist()
    assert encoder.tokenizer.decode(sample.input_ids[len(prompt.input_ids) :]) == "There.<|im_end|>\n"


def test_chatml_serves_a_tokenizer_without_template(encoder, tmp_path):
    plain = replace(encoder, template=ChatTemplate(CHATML))
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    sample, _, _ = _encode(plain, row, tmp_path)
    wanted = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
    assert encoder.tokenizer.decode(sample.input_ids) == wanted


def test_a_template_that_rewrites_earlier_turns_is_refused(encoder, tmp_path):
    forgetful = "{% for m in messages %}{{ m.role if loop.last else '-' }}{{ m.content }};{% endfor %}"
    turns = [{"role": role, "content": role[0]} for role in ("user", "assistant") * 2]
    with pytest.raises(BadSample, match="rewrites earlier turns .* set data.chat_template"):
        _encode(replace(encoder, template=ChatTemplate(forgetful)), {"messages": turns}, tmp_path)


def test_a_template_that_refuses_is_quoted(encoder, tmp_path):
    strict = "{{ raise_exception('roles must alternate') }}"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(BadSample, match="refuses the conversation: roles must alternate"):
        _encode(replace(encoder, template=ChatTemplate(strict)), {"messages": turns}, tmp_path)


def test_a_placeholder_in_the_text_is_refused(encoder, tmp_path):
    turns = [{"role": "user", "content": "say <|image_pad|>"}, {"role": "assistant", "content": "no"}]
    with pytest.raises(BadSample, match=r"the text itself contains <\|image_pad\|>"):
        _encode(encoder, {"messages": turns}, tmp_path)


def test_an_image_of_extreme_shape_is_refused(encoder, draw_image, tmp_path):
    row = {
        "image": draw_image("strip.png", 900, 2),
        "messages": [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "no"}],
    }
    with pytest.raises(BadSample, match="strip.png: 900 x 2 pixels is longer than 200 times"):
        _encode(encoder, row, tmp_path)


def test_an_answer_in_pixels_of_another_size_than_is_shown_is_refused(encoder, draw_image, tmp_path):
    turns = [{"from": "human", "value": "<image>Where?"}, {"from": "gpt", "value": "[(10, 20)]"}]
    row = {"image": [draw_image("a.png", 90, 61)], "conversations": turns}
    sample, _, _ = _encode(encoder, row, tmp_path)
    width, height = (sample.grids[0].w * encoder.processor.patch_size, sample.grids[0].h * encoder.processor.patch_size)
    points = {"points": [[10, 20]], "frame": "pixels", "size": [width, height]}
    assert _encode(encoder, row | {"points": points}, tmp_path)[0].input_ids.tolist() == sample.input_ids.tolist()
    with pytest.raises(BadSample, match=f"pixels of 61 x 90, the model is shown {width} x {height}"):
        _encode(encoder, row | {"points": points | {"size": [61, 90]}}, tmp_path)
    grid = {"points": [[10, 20]], "frame": "0-1000"}
    assert _encode(encoder, row | {"points": grid}, tmp_path)[0].input_ids.tolist() == sample.input_ids.tolist()
