"""Functions that a row offers and calls, in the form that chat templates take."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from megatron_rb.data.keys import empty
from megatron_rb.data.problems import BadSample, quoted

Function = Mapping[str, Any]


def read_tools(row: Mapping[str, Any]) -> tuple[Function, ...]:
    """`tools` (OpenAI's list, bare functions, or JSON text of either) or OpenAI's older `functions`.

    Raises:
        BadSample: they are something else.
    """
    return tuple(
        _wrapped(item, key) for key in ("tools", "functions") for item in _items(_parsed(row.get(key), key), key)
    )


def read_calls(value: Any, key: str) -> tuple[Function, ...]:
    """One call or a list of them, as objects or JSON text, with their arguments as an object.

    Raises:
        BadSample: a call has no name, or its arguments are no object.
    """
    calls = _parsed(value, key)
    return tuple(_call(item, key) for item in (_items(calls, key) if isinstance(calls, list) else [calls]))


def _parsed(value: Any, key: str) -> Any:
    if not isinstance(value, str) or not value:
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise BadSample(f"key {key}", f"{key} is text that is not JSON: {quoted(value)}") from error


def _items(value: Any, key: str) -> list[Any]:
    if empty(value):
        return []
    if not isinstance(value, list):
        raise BadSample(f"key {key}", f"{key} is {quoted(value)}; give a list")
    return value


def _wrapped(item: Any, key: str) -> Function:
    function = item.get("function", item) if isinstance(item, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadSample(f"key {key}", f"{key} holds {quoted(item)}, which is no function with a name")
    return item if "function" in item else {"type": "function", "function": function}


def _call(item: Any, key: str) -> Function:
    call = dict(_wrapped(item, key))
    function = dict(call["function"])
    arguments = _parsed(function.get("arguments"), f"{key} arguments")
    if not isinstance(arguments, dict) and not empty(arguments):
        raise BadSample(f"key {key}", f"{key} calls {function['name']!r} with {quoted(arguments)}; give an object")
    function["arguments"] = arguments or {}
    return call | {"type": "function", "function": function}
