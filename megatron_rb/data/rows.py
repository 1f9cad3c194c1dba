"""One line of a data file -> a conversation whose images and videos stand where they belong.

The public forms are read: ShareGPT (`conversations` with `from` and `value`, `<image>` and `<video>` markers in the
text, paths in `image`, `images`, `video` or `videos`), OpenAI (`messages` with `role` and `content`), Qwen's,
LLaMA-Factory's and ms-swift's. `keys` says what becomes of every key.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_rb.data.content import ContentReader, Said
from megatron_rb.data.conversation import Conversation, MediaRef, Turn
from megatron_rb.data.ground_truth import check_points, pixel_size
from megatron_rb.data.keys import ROW_KEYS, TURN_KEYS, check_keys, empty
from megatron_rb.data.numbers import truth
from megatron_rb.data.problems import BadSample, quoted
from megatron_rb.data.tools import read_calls, read_tools
from megatron_rb.data.turns import CALL, given_turns, side_keys, text_of

LOSS_KEYS = ("loss", "weight", "trainable", "loss_mask", "train", "training", "loss_weight", "loss_scale")
THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")
__all__ = ["MediaRef", "parse_line", "parse_row"]
CALL_KEYS = ("tool_calls", "function_call")


def parse_line(line: bytes, default_id: str, media_root: Path) -> Conversation:
    """Read one line of a jsonl file.

    Raises:
        BadSample: the line is not JSON, or not a conversation that can be trained on.
    """
    try:
        row = json.loads(line, object_pairs_hook=_without_doubles)
    except RecursionError as error:
        raise BadSample("not JSON", "the line is nested too deep to be read") from error
    except BadSample:
        raise
    except ValueError as error:
        raise BadSample("not JSON", f"the line is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise BadSample("not an object", f"the line holds a {type(row).__name__}, not an object")
    return parse_row(row, default_id, media_root)


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, unless one of its keys stands twice with different values: JSON readers then drop all but the last."""
    made = dict(pairs)
    if len(made) != len(pairs):
        for key, value in pairs:
            if made[key] != value:
                raise BadSample(
                    f"key {key}",
                    f"the key {quoted(key)} stands twice, as {quoted(value)} and as "
                    f"{quoted(made[key])}; keep one of them",
                )
    return made


def parse_row(row: Mapping[str, Any], default_id: str, media_root: Path) -> Conversation:
    """Turn a row into a conversation; relative paths start at `media_root`.

    Raises:
        BadSample: unknown roles, no assistant turn, markers that do not match the media, a key that cannot be honoured.
    """
    _check_characters(row)
    unread = check_keys(row, ROW_KEYS, "")
    _check_label(row)
    check_points(row)
    content = ContentReader(row, media_root)
    turns = _joined(list(_turns(row, content)))
    content.check_used_up()
    if not any(turn.role == "assistant" for turn in turns):
        raise BadSample("no assistant turn", "the conversation has no assistant turn, so there is nothing to learn")
    unread += [*content.unread, *side_keys(row)]
    name = row.get("id")
    sample_id = str(default_id if name is None else name)
    return Conversation(sample_id, turns, pixel_size(row), read_tools(row), unread=tuple(sorted(set(unread))))


def _check_characters(row: Mapping[str, Any]) -> None:
    """Half an emoji is legal JSON (a lone surrogate), but no text: neither tokenizer nor file takes it."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except RecursionError as error:
        raise BadSample("not JSON", "the row is nested too deep to be read") from error
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        before = error.object[max(0, error.start - 20) : error.start]
        raise BadSample(
            "half a character", f"the text holds {half!r}, half a character (a lone surrogate), after {quoted(before)}"
        ) from error


def _check_label(row: Mapping[str, Any]) -> None:
    for key in ("label", "kto_tag"):
        value = row.get(key)
        if value is not None and value is not True:
            raise BadSample(
                f"key {key}",
                f"the row's key {key!r} is {quoted(value)}; true marks a wished answer (KTO), which is learned, all "
                f"else refuses the row: drop the key if it means something else",
            )


def _turns(row: Mapping[str, Any], content: ContentReader) -> Iterator[Turn]:
    for number, (role, given) in enumerate(given_turns(row)):
        content.unread += check_keys(given, TURN_KEYS, "turn")
        said = _said(role, given, content)
        learned = _learned(number, role, given)
        for key in THOUGHT_KEYS:
            said.thoughts += [_thought(given[key], key)] if not empty(given.get(key)) else []
        if role != CALL and not (said.parts or said.calls or said.thoughts) and given["content"] is None:
            raise BadSample("no conversation", f"turn {number} says nothing: its content is null, and it calls no tool")
        if role not in ("assistant", CALL) and (said.thoughts or said.calls):
            raise BadSample("no conversation", f"turn {number} of the {role} has thoughts or calls of an assistant")
        names = tuple((key, str(given[key])) for key in ("name", "tool_call_id") if not empty(given.get(key)))
        yield Turn(role, tuple(said.parts), learned, "\n".join(said.thoughts) or None, tuple(said.calls), names)


def _said(role: str, given: Mapping[str, Any], content: ContentReader) -> Said:
    what = given["content"]
    if role == CALL:
        return Said(calls=list(read_calls(what, str(given.get("role", given.get("from"))))))
    as_parts = isinstance(what, list) and all(isinstance(part, dict) and "type" in part for part in what)
    said = content.read(text_of(what) if role == "tool" and not as_parts and what is not None else what)
    for key in CALL_KEYS:
        said.calls += read_calls(given[key], key) if not empty(given.get(key)) else []
    return said


def _learned(number: int, role: str, given: Mapping[str, Any]) -> bool | None:
    """What a turn says about its loss.

    Raises:
        BadSample: its keys contradict each other, or want to learn what somebody else said.
    """
    marks = {key: mark for key in LOSS_KEYS if (mark := truth(given, key)) is not None}
    if len(set(marks.values())) > 1:
        raise BadSample("key loss", f"turn {number} is marked {quoted(marks)}, which contradict each other")
    key, mark = next(iter(marks.items()), ("", None))
    if mark and role not in ("assistant", CALL):
        raise BadSample(f"key {key}", f"turn {number} of the {role} is marked {key}: true; only answers are learned")
    return mark


def _thought(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise BadSample(f"key {key}", f"{key} is {quoted(value)}; give text")
    return value


def _joined(turns: list[Turn]) -> tuple[Turn, ...]:
    """Turns that are calls alone become a part of the assistant's turn before them, as ms-swift writes them."""
    joined: list[Turn] = []
    for turn in turns:
        before = joined[-1] if joined else None
        if turn.role != CALL:
            joined.append(turn)
        elif before is None or before.role != "assistant":
            joined.append(replace(turn, role="assistant"))
        else:
            joined[-1] = _with_calls(before, turn)
    return tuple(joined)


def _with_calls(before: Turn, calls: Turn) -> Turn:
    if calls.learned is not None and before.learned is not None and calls.learned != before.learned:
        raise BadSample("key loss", "an assistant's turn and its calls are marked differently for the loss")
    learned = calls.learned if before.learned is None else before.learned
    return replace(before, learned=learned, tool_calls=(*before.tool_calls, *calls.tool_calls))
