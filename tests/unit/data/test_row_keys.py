"""No key that means something is dropped: it is read, or it refuses the row by its name."""

from pathlib import Path

import pytest

from megatron_rb.data.keys import PART_KEYS, READ, REFUSED, ROW_KEYS, TURN_KEYS, key_table
from megatron_rb.data.problems import BadSample
from megatron_rb.data.rows import parse_row

DOCS = Path(__file__).parents[3] / "docs/data.md"
ASK, ANSWER = {"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here."}


def _row(**keys) -> dict:
    return {"messages": [ASK, ANSWER], **keys}


def _read(row: dict):
    return parse_row(row, "x", Path("/media"))


@pytest.mark.parametrize(
    ("title", "table"),
    [("Keys of a row", ROW_KEYS), ("Keys of a turn", TURN_KEYS), ("Keys of a content part", PART_KEYS)],
)
def test_the_documentation_holds_the_tables_of_the_code(title, table):
    section = DOCS.read_text().split(f"## {title}\n")[1].split("\n## ")[0]
    assert [line for line in section.splitlines() if line.startswith("|")] == list(key_table(table))


@pytest.mark.parametrize("key", [key for key, known in ROW_KEYS.items() if known.fate == REFUSED])
def test_a_row_is_refused_by_the_name_of_a_key_that_cannot_be_honoured(key):
    with pytest.raises(BadSample, match=f"the row's key '{key}' is .*'something'"):
        _read(_row(**{key: "something"}))


@pytest.mark.parametrize("key", [key for key, known in TURN_KEYS.items() if known.fate == REFUSED])
def test_so_is_one_with_such_a_key_in_a_turn(key):
    with pytest.raises(BadSample, match=f"the turn's key '{key}' is"):
        _read({"messages": [ASK, ANSWER | {key: "something"}]})


@pytest.mark.parametrize("nothing", [None, "", [], {}, [None]])
def test_empty_keys_are_those_of_a_table_whose_other_rows_use_them(nothing):
    keys = [key for key, known in ROW_KEYS.items() if known.fate == REFUSED or "image" in key or "video" in key]
    row = _row(**dict.fromkeys([*keys, "tools", "objects", "history", "system"], nothing))
    assert _read(row).turns == _read(_row()).turns


def test_keys_that_nobody_knows_are_told():
    row = {"messages": [ASK | {"mood": 1}, ANSWER], "colour": "red", "output": "beside the messages", "task": "known"}
    assert _read(row).unread == ("colour", "output", "turn.mood")


def test_every_key_of_a_row_that_is_read_has_an_effect():
    """The effects themselves have tests of their own; a key that is only listed would be dropped in silence."""
    source = "".join(
        (Path(__file__).parents[3] / f"megatron_rb/data/{name}.py").read_text()
        for name in ("rows", "turns", "tools", "content", "media_keys", "media_names", "boxes", "ground_truth")
    )
    silent = [
        key
        for table in (ROW_KEYS, TURN_KEYS, PART_KEYS)
        for key, known in table.items()
        if known.fate == READ and f'"{key}"' not in source and key not in ("images", "videos")
    ]
    assert silent == []


@pytest.mark.parametrize("key", ["label", "kto_tag"])
def test_a_wished_answer_is_an_ordinary_row(key):
    assert _read(_row(**{key: True})).turns == _read(_row()).turns


@pytest.mark.parametrize("value", [False, 0, 1, "good"])
def test_an_answer_that_nobody_wished_for_is_not_learned(value):
    with pytest.raises(BadSample, match="the row's key 'label' is"):
        _read(_row(label=value))
