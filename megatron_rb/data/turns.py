"""The turns of a row, whichever public form they are written in."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_rb.data.keys import empty
from megatron_rb.data.problems import BadSample, quoted

CALL = "call"
"""A turn that is nothing but calls of functions; becomes a part of the assistant's."""
ROLES = {
    "system": "system",
    "developer": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "assistant": "assistant",
    "function_call": CALL,
    "tool_call": CALL,
    "tool": "tool",
    "observation": "tool",
    "observations": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "function": "tool",
}
LISTS = ("conversations", "conversation", "messages")
QUESTIONS, ANSWERS = ("instruction", "query"), ("output", "response")
Given = dict[str, Any]


def given_turns(row: Mapping[str, Any]) -> Iterator[tuple[str, Given]]:
    """Role (of `ROLES`' values) and the turn as it was written, with `content`, for each turn.

    Raises:
        BadSample: there is none, a turn is no turn, or its role is unknown.
    """
    for number, turn in enumerate(_with_system(_listed(row), row)):
        who, what = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        role = ROLES.get(str(who).replace("-", "_"))
        other = turn.get("from", who)
        if ROLES.get(str(other).replace("-", "_")) != role:
            raise BadSample(
                "unknown role", f"turn {number} is from {quoted(other)} and {quoted(who)}; keep one of them"
            )
        if role is None:
            raise BadSample("unknown role", f"turn {number} is from {quoted(who)}; use one of {', '.join(ROLES)}")
        if role == "system" and number > 0:
            raise BadSample("unknown role", f"turn {number} is a system turn; only the first may be one")
        yield role, turn | {"content": what}


def side_keys(row: Mapping[str, Any]) -> set[str]:
    """Keys of one form that only annotate a row of another: `output` beside `conversations`."""
    form = _form(row)
    others = {*LISTS, *QUESTIONS, *ANSWERS, "input", "history"} if form else set()
    mine = {form} if form in LISTS else {*QUESTIONS, *ANSWERS, "input", "history"}
    return {key for key in others - mine if not empty(row.get(key))}


def text_of(content: Any) -> str:
    """What a tool gave back: text as it is, anything else as JSON."""
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)


def _form(row: Mapping[str, Any]) -> str:
    """The key of the row's turns; of a question when it has no list of them, and nothing when it has neither."""
    lists = [key for key in LISTS if not empty(row.get(key))]
    if len(lists) > 1:
        raise BadSample("no conversation", f"the row has {' and '.join(map(repr, lists))}; keep one of them")
    questions = [key for key in (*QUESTIONS, "input") if not empty(row.get(key))]
    answers = [key for key in ANSWERS if not empty(row.get(key))]
    second = ["history"] if not empty(row.get("history")) else [*questions[:1], *answers[:1]]
    if lists and (second == ["history"] or questions and answers):
        # One of them alone, e.g. `output`, is a note beside the turns.
        raise BadSample(
            "no conversation", f"the row has turns in {lists[0]!r} and in {' with '.join(map(repr, second))}; keep one"
        )
    return next(iter([*lists, *questions]), "")


def _listed(row: Mapping[str, Any]) -> list[Given]:
    form = _form(row)
    if form in LISTS:
        return _of_list(row[form], form)
    answers = [key for key in ANSWERS if row.get(key) is not None]
    if form and len(answers) == 1:
        return _of_pairs([*_history(row), (_question(row), row[answers[0]])])
    if isinstance(row.get("text"), str):
        raise BadSample("no conversation", "the row is a text without turns ('text'); plain texts are not trained on")
    known = "'conversations', 'messages', 'instruction' with 'output', or 'query' with 'response'"
    raise BadSample("no conversation", f"the row has no turns: none of {known}; its keys are {quoted(list(row))}")


def _of_list(turns: Any, form: str) -> list[Given]:
    if not isinstance(turns, list):
        raise BadSample("no conversation", f"{form} is {quoted(turns)}; give a list of turns")
    return [turn for number, item in enumerate(turns) for turn in _turn(item, number)]


def _turn(item: Any, number: int) -> list[Given]:
    if isinstance(item, dict) and ("role" in item or "from" in item):
        if "content" in item or "value" in item or "tool_calls" in item or "function_call" in item:
            return [item]
    elif isinstance(item, dict) and len(item) == 2 and item.keys() <= {"human", "user", "assistant", "gpt", "bot"}:
        return [{"role": who, "content": said} for who, said in sorted(item.items(), key=_answers_last)]
    raise BadSample(
        "no conversation",
        f"turn {number} is {quoted(item)}; give an object with 'from' and 'value', or 'role' and 'content'",
    )


def _answers_last(turn: tuple[str, Any]) -> bool:
    return ROLES[turn[0]] == "assistant"


def _of_pairs(pairs: list[tuple[Any, Any]]) -> list[Given]:
    speakers = ("user", "assistant")
    return [{"role": role, "content": text} for pair in pairs for role, text in zip(speakers, pair, strict=True)]


def _history(row: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    history = row.get("history")
    if empty(history):
        return []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise BadSample("key history", f"history is {quoted(history)}; give [[question, answer], ...]")
    return [(question, answer) for question, answer in history]


def _question(row: Mapping[str, Any]) -> str:
    parts = [row[key] for key in (*QUESTIONS, "input") if not empty(row.get(key))]
    if not all(isinstance(part, str) for part in parts):
        raise BadSample("no conversation", f"the question is {quoted(parts)}; give text")
    return "\n".join(parts)


def _with_system(turns: list[Given], row: Mapping[str, Any]) -> list[Given]:
    """The row's system prompt goes first, unless the turns bring their own, as LLaMA-Factory and ms-swift have it."""
    given = [row[key] for key in ("system", "system_prompt") if not empty(row.get(key))]
    if not given or (turns and ROLES.get(str(turns[0].get("role", turns[0].get("from")))) == "system"):
        return turns
    if not isinstance(given[0], str):
        raise BadSample("key system", f"system is {quoted(given[0])}; give text")
    return [{"role": "system", "content": given[0]}, *turns]
