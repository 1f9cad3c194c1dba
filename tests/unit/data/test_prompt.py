"""Conversations through chat templates: tools, thoughts, and templates that write earlier turns differently later."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_rb.config.schema import DataConfig
from megatron_rb.data.build import build_dataset
from megatron_rb.data.ledger import Ledger, read_ledger
from megatron_rb.data.problems import BadSample
from megatron_rb.data.prompt import CHATML, ChatTemplate
from megatron_rb.data.rows import parse_row
from megatron_rb.data.sample import IGNORED

THINKING = """\
{%- if tools %}{{ '<|im_start|>system\\n' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{{ '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{{- '<|im_start|>' + ('user' if message.role == 'tool' else message.role) + '\\n' }}
{%- set later = messages[loop.index:] | selectattr('role', 'eq', 'user') | list %}
{%- if message.role == 'assistant' and not later %}
{{- '<think>\\n' + (message.reasoning_content or '') + '\\n</think>\\n\\n' }}
{%- endif %}
{{- message.content }}
{%- for call in message.tool_calls or [] %}{{- '<call>' + (call.function | tojson) + '</call>' }}{% endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
"""Thoughts of turns before the last question are dropped, as Qwen3's template does."""
CALL = {"type": "function", "function": {"name": "grasp", "arguments": {"x": 1}}}


def _user(text: str) -> dict:
    return {"role": "user", "content": text}


def _says(text: str, **keys) -> dict:
    return {"role": "assistant", "content": text, **keys}


TWO_TURNS = {
    "id": "row",
    "messages": [
        _user("a"),
        _says("first", reasoning_content="thought one"),
        _user("b"),
        _says("second", reasoning_content="thought two"),
    ],
}


def _pieces(source: str, row: dict, **options):
    return ChatTemplate(source).pieces(parse_row(row, "x", Path()), **options)


def _learned(pieces) -> list[str]:
    return [piece.text for piece in pieces if piece.learned]


def _dataset(encoder, rows: list[dict], folder: Path, **settings):
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ledger = Ledger(folder / "ledger.jsonl")
    config = DataConfig(system_prompt="", **settings)
    return build_dataset(config, encoder, [str(file)], ledger, cache_dir=folder / "index")


def _texts(dataset) -> list[tuple[str, str]]:
    """What is read and what is learned of every sample."""
    decode, texts = dataset.encoder.tokenizer.decode, []
    for number in range(len(dataset)):
        sample = dataset.get(number, with_pixels=False)
        learned = sample.labels != IGNORED
        texts.append((decode(sample.input_ids[~learned]), decode(sample.input_ids[learned])))
    return texts


@pytest.fixture
def thinking(encoder):
    return replace(encoder, template=ChatTemplate(THINKING))


def test_every_turn_of_a_thinking_conversation_is_a_sample(thinking, tmp_path):
    dataset = _dataset(thinking, [TWO_TURNS], tmp_path)
    start = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert _texts(dataset) == [
        (start, "<think>\nthought one\n</think>\n\nfirst<|im_end|>\n"),
        (
            start + "first<|im_end|>\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n",
            "<think>\nthought two\n</think>\n\nsecond<|im_end|>\n",
        ),
    ]


def test_the_prompt_of_a_turn_is_what_generation_would_see(thinking, tmp_path):
    dataset = _dataset(thinking, [TWO_TURNS], tmp_path)
    for number in range(2):
        sample, prompt = dataset.get(number, with_pixels=False), dataset.prompt(number)
        assert prompt.input_ids.tolist() == sample.input_ids[sample.labels == IGNORED].tolist()


def test_samples_of_one_row_have_names_of_their_own_and_one_line(thinking, tmp_path):
    dataset = _dataset(thinking, [TWO_TURNS], tmp_path)
    assert [dataset.get(number, with_pixels=False).sample_id for number in range(2)] == ["row#1", "row#3"]
    assert [dataset.source(number)[1] for number in range(2)] == [1, 1]


def test_an_index_that_is_read_again_knows_the_turns(thinking, tmp_path):
    first = _texts(_dataset(thinking, [TWO_TURNS], tmp_path))
    assert _texts(_dataset(thinking, [TWO_TURNS], tmp_path)) == first


def test_a_turn_takes_the_pictures_up_to_it(thinking, draw_image, tmp_path):
    names = [draw_image("a.png", 64, 64), draw_image("b.png", 96, 64)]
    turns = [_user("<image>a"), _says("first"), _user("<image>b"), _says("second")]
    dataset = _dataset(thinking, [{"images": names, "messages": turns}], tmp_path)
    assert [len(dataset[number].pixels) for number in range(2)] == [1, 2]
    tokens, patches = np.array(dataset.sizes).T
    assert [len(dataset[number].input_ids) for number in range(2)] == tokens.tolist()
    assert [dataset[number].num_patches for number in range(2)] == patches.tolist()


def test_a_turn_that_is_too_long_leaves_the_others(thinking, tmp_path):
    turns = [_user("a"), _says("first"), _user("b " * 200), _says("second")]
    dataset = _dataset(thinking, [{"id": "row", "messages": turns}], tmp_path, seq_length=100)
    assert len(dataset) == 1
    (refusal,) = read_ledger(tmp_path / "ledger.jsonl")
    assert (refusal["id"], refusal["line"], refusal["problem"]) == ("row#3", 1, "too many tokens")


def test_turns_that_are_not_learned_become_no_samples(thinking, tmp_path):
    marked = TWO_TURNS["messages"][:1] + [_says("WRONG", loss=False)] + TWO_TURNS["messages"][2:]
    (only,) = _texts(_dataset(thinking, [{"messages": marked}], tmp_path))
    assert "WRONG" in only[0] and "second" in only[1]


def test_only_the_last_turn_is_learned_when_so_set():
    row = {"messages": [_user("a"), _says("first"), _user("b"), _says("second")]}
    assert _learned(_pieces(CHATML, row)) == ["first<|im_end|>\n", "second<|im_end|>\n"]
    assert _learned(_pieces(CHATML, row, loss_turns="last")) == ["second<|im_end|>\n"]


def test_what_a_turn_says_of_itself_goes_before_the_setting():
    row = {"messages": [_user("a"), _says("first", loss=True), _user("b"), _says("second", weight=0)]}
    assert _learned(_pieces(CHATML, row, loss_turns="last")) == ["first<|im_end|>\n"]


def test_a_turn_that_is_not_learned_is_read():
    row = {"messages": [_user("a"), _says("WRONG", loss=False), _user("b"), _says("right")]}
    pieces = _pieces(CHATML, row)
    assert _learned(pieces) == ["right<|im_end|>\n"]
    assert "WRONG" in "".join(piece.text for piece in pieces)


def test_thoughts_go_into_the_text_of_a_template_without_a_place_for_them():
    row = {"messages": [_user("a"), _says("3", reasoning_content="One left, two right.")]}
    assert _learned(_pieces(CHATML, row)) == ["<think>\nOne left, two right.\n</think>\n\n3<|im_end|>\n"]


def test_calls_are_learned_as_the_template_writes_them():
    row = {"tools": [CALL], "messages": [_user("a"), _says("", tool_calls=[CALL])]}
    pieces = _pieces(THINKING, row)
    assert '{"type": "function", "function": {"name": "grasp"' in pieces[0].text
    assert '<call>{"name": "grasp", "arguments": {"x": 1}}</call>' in pieces[1].text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tools": [CALL], "messages": [_user("a"), _says("b")]}, "cannot write 'tools'; set data.chat_template"),
        ({"messages": [_user("a"), _says("", tool_calls=[CALL])]}, "cannot write 'tool_calls'"),
        ({"messages": [_user("a"), _says("b"), {"role": "tool", "content": "c"}, _says("d")]}, "turns of a tool"),
    ],
)
def test_a_template_that_cannot_write_tools_refuses_the_row(row, message):
    with pytest.raises(BadSample, match=message):
        _pieces(CHATML, row)


def test_a_template_that_drops_thoughts_it_knows_of_is_refused():
    forgetful = CHATML + "{# #}{% if false %}{{ messages[0].reasoning_content }}{% endif %}"
    row = {"messages": [_user("a"), _says("3", reasoning_content="One left, two right.")]}
    with pytest.raises(BadSample, match="leaves out 'One left, two right.'"):
        _pieces(forgetful, row)
