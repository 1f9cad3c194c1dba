"""Who said what, in the public forms, and what is learned of it."""

import json
from pathlib import Path

import pytest

from megatron_rb.data.problems import BadSample
from megatron_rb.data.rows import parse_row

ASK, ANSWER = {"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here."}
SYSTEM = {"system": "Be brief."}
CALL = {"name": "grasp", "arguments": {"x": 1}}
ANSWERLESS = {"role": "assistant", "content": ""}
FUNCTION = {"type": "function", "function": CALL}


def _read(row: dict):
    return parse_row(row, "x", Path("/media"))


def _said(row: dict) -> list[tuple]:
    return [(turn.role, *turn.parts) for turn in _read(row).turns]


def _answer(**keys):
    return _read({"messages": [ASK, {"role": "assistant", "content": "Here."} | keys]}).turns[1]


@pytest.mark.parametrize(
    "row",
    [
        SYSTEM | {"conversations": [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": "Here."}]},
        {"system_prompt": "Be brief.", "messages": [ASK, ANSWER]},
        {"messages": [{"role": "developer", "content": "Be brief."}, ASK, ANSWER]},
        {"system": "another", "messages": [{"role": "system", "content": "Be brief."}, ASK, ANSWER]},
        {"system": "Be brief.", "conversation": [{"assistant": "Here.", "human": "Where?"}]},
        {"system": "Be brief.", "instruction": "Where?", "input": "", "output": "Here."},
        {"system": "Be brief.", "query": "Where?", "response": "Here."},
        SYSTEM | {"messages": [{"role": "user", "content": [{"type": "text", "value": "Where?"}]}, ANSWER]},
        {"system": "Be brief.", "messages": [{"role": "user", "content": [{"text": "Where?"}]}, ANSWER]},
    ],
)
def test_every_form_gives_the_same_turns(row):
    assert _said(row) == [("system", "Be brief."), ("user", "Where?"), ("assistant", "Here.")]


def test_alpaca_joins_instruction_and_input_and_learns_the_history():
    row = {"instruction": "Add.", "input": "1 and 2", "output": "3", "history": [["Hi", "Hello"]]}
    assert _said(row) == [("user", "Hi"), ("assistant", "Hello"), ("user", "Add.\n1 and 2"), ("assistant", "3")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "Once upon a time"}, "a text without turns"),
        ({"instruction": "Add."}, "the row has no turns"),
        ({"messages": [ASK, ANSWER], "conversations": [{"from": "gpt", "value": "a"}]}, "keep one of them"),
        ({"query": "a", "response": "b", "history": ["c"]}, "history is .* give"),
        ({"messages": [ASK, {"role": "assistant", "content": None}]}, "says nothing"),
        ({"messages": [ASK | {"reasoning_content": "hm"}, ANSWER]}, "has thoughts or calls of an assistant"),
    ],
)
def test_what_is_no_conversation_is_refused(row, message):
    with pytest.raises(BadSample, match=message):
        _read(row)


@pytest.mark.parametrize("key", ["loss", "weight", "trainable", "loss_mask", "train", "training", "loss_scale"])
@pytest.mark.parametrize(("value", "learned"), [(False, False), (0, False), (1.0, True), (True, True), (None, None)])
def test_a_turn_says_whether_it_is_learned(key, value, learned):
    assert _answer(**{key: value}).learned is learned


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"weight": 0.5}, "weight is 0.5; only true, false, 1 and 0"),
        ({"loss_mask": [0, 1]}, r"loss_mask is \[0, 1\]"),
        ({"loss": True, "weight": 0}, "contradict each other"),
    ],
)
def test_other_marks_refuse_the_row(turn, message):
    with pytest.raises(BadSample, match=message):
        _answer(**turn)


def test_what_the_user_says_cannot_be_learned():
    with pytest.raises(BadSample, match="turn 0 of the user is marked loss: true"):
        _read({"messages": [ASK | {"loss": True}, ANSWER]})


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_are_kept(key):
    assert _answer(**{key: "One left."}).reasoning == "One left."
    part = {"type": "reasoning", "value": "One left."}
    assert _answer(content=[part, {"type": "text", "text": "Here."}]).reasoning == "One left."


@pytest.mark.parametrize(
    "turns",
    [
        [{"role": "assistant", "content": None, "tool_calls": [FUNCTION]}],
        [ANSWERLESS | {"tool_calls": [{"function": {"name": "grasp", "arguments": '{"x": 1}'}}]}],
        [{"role": "assistant", "function_call": CALL}],
        [{"role": "assistant", "content": [{"type": "tool_call", "value": json.dumps(CALL)}]}],
        [{"from": "function_call", "value": json.dumps(CALL)}],
        [{"role": "tool_call", "content": CALL}],
    ],
)
def test_calls_are_kept_in_every_form(turns):
    (turn,) = _read({"messages": [ASK, *turns]}).turns[1:]
    assert (turn.role, turn.tool_calls) == ("assistant", (FUNCTION,))


def test_calls_belong_to_the_words_before_them():
    calls = [{"role": "tool_call", "content": json.dumps(CALL)}] * 2
    (turn,) = _read({"messages": [ASK, ANSWER | {"loss": False}, *calls]}).turns[1:]
    assert (turn.parts, len(turn.tool_calls), turn.learned) == (("Here.",), 2, False)


@pytest.mark.parametrize("role", ["tool", "observation", "tool_response", "function"])
def test_what_a_tool_gave_back_is_a_turn(role):
    row = {"messages": [ASK, ANSWER | {"tool_calls": [FUNCTION]}, {"role": role, "content": {"held": True}}, ANSWER]}
    assert _said(row)[2] == ("tool", '{"held": true}')


@pytest.mark.parametrize("tools", [[FUNCTION], json.dumps([FUNCTION]), [CALL], json.dumps([CALL])])
def test_tools_are_a_list_or_its_text_wrapped_or_not(tools):
    assert _read({"messages": [ASK, ANSWER], "tools": tools}).tools == (FUNCTION,)


@pytest.mark.parametrize("tools", ["grasp", [3], [{"type": "function"}], {"name": "grasp"}])
def test_other_tools_refuse_the_row(tools):
    with pytest.raises(BadSample, match="tools"):
        _read({"messages": [ASK, ANSWER], "tools": tools})
