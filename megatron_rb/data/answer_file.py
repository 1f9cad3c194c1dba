"""The answers file: a line of `question_id` and `answer` per question, appended as they come, so that runs continue."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_rb.data.json_object import as_object


def check_same_source(out: Path, source: Mapping[str, object]) -> None:
    """Write down what answers in `out` come from, or compare with what an earlier run wrote.

    Raises:
        ValueError: the earlier answers come from something else; the two must not be mixed.
    """
    file = out.with_suffix(".source.json")
    now = json.loads(json.dumps(dict(source)))
    if file.is_file() and out.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        changed = [f"{key} was {was!r}, is {here!r}" for key, was, here in _differences(before, now)]
        if changed:
            raise ValueError(f"{out} holds answers of another run ({'; '.join(changed)}); choose another --out")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(now, indent=1), encoding="utf-8")


def _differences(before: Any, now: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Keys that differ, of nested mappings the innermost."""
    for key in {**now, **before}:
        was, here = before.get(key), now.get(key)
        if isinstance(was, dict) and isinstance(here, dict):
            yield from _differences(was, here, f"{prefix}{key}.")
        elif was != here:
            yield f"{prefix}{key}", was, here


def rows_in(out: Path) -> dict[str, dict]:
    """Lines of an earlier run by question id; a half-written last line is dropped."""
    if not out.is_file():
        return {}
    whole = [line for line in out.read_text(encoding="utf-8").split("\n")[:-1] if line]
    write_whole(out, "".join(line + "\n" for line in whole))
    return {row["question_id"]: row for row in map(json.loads, whole)}


def answers_in(out: Path) -> dict[str, str]:
    """The answers of `rows_in`."""
    return {key: row["answer"] for key, row in rows_in(out).items()}


def usage_in(out: Path) -> dict[str, tuple[int, int]]:
    """Tokens of prompt and answer by question id, where the run that wrote `out` counted them."""
    rows = rows_in(out).items()
    return {key: (row["prompt_tokens"], row["completion_tokens"]) for key, row in rows if "prompt_tokens" in row}


def write_whole(file: Path, text: str) -> None:
    """Write a file that no reader ever sees in part."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


def read_answers(path: Path) -> dict[str, str]:
    """Recorded answers by id from jsonl or a JSON list of `{"question_id" or "id", "answer"}`.

    Several tries at one question (`"answer": {"inference_0": ...}`) get ids of their own, `<id>_inference_0`.

    Raises:
        ValueError: the file holds something else.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
        answers: dict[str, str] = {}
        for row in map(as_object, rows):
            key, answer = str(row.get("question_id", row.get("id"))), row.get("answer")
            tries = answer if isinstance(answer, dict) else {}
            answers |= {f"{key}_{name}": _text(said) for name, said in tries.items()} or {key: _text(answer)}
        return answers
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{path} is not a list of {{"question_id": ..., "answer": ...}}: {error}') from error


def _text(answer: Any) -> str:
    """As it was said, without halves of surrogate pairs, which no file can hold; nothing said is an empty answer."""
    return "" if answer is None else str(answer).encode(errors="replace").decode()
