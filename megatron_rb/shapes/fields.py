"""The fields of a config.json: each of its default's type, and none that asks for what the layers do not compute."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

Fields = Mapping[str, Any]
"""A section of config.json, completed with the defaults of its family."""

MAY_BE_NULL = ("num_key_value_heads", "head_dim", "use_sliding_window", "sliding_window")
"""Fields whose null has a meaning of its own: as many as heads, the hidden size shared among them, no."""
MAY_BE_ZERO = ("sliding_window", "max_window_layers", "initializer_range", "tokens_per_second")
MAY_BE_FRACTIONS = ("mlp_ratio", "tokens_per_second")
"""Numbers whose usual value is a whole one."""


def mapping(value: Any, where: str) -> dict[str, Any]:
    """A value that must be a section.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} must hold fields in braces, got {value!r}")
    return dict(value)


def check_types(fields: Fields, defaults: Fields, where: str) -> None:
    """Raise ValueError for the first field that is of another type than its default, or no size.

    Args:
        where: file and section, which the field's name is written behind.
    """
    for name, default in defaults.items():
        if fields[name] is not None or name not in MAY_BE_NULL:
            check_type(fields[name], default, f"{where}{name}", least=0 if name in MAY_BE_ZERO else None)


def check_type(value: Any, default: Any, where: str, least: int | None = None) -> None:
    """Raise ValueError unless a value is of the type of another.

    Args:
        least: smallest number; None = it must be above 0.
    """
    fraction = isinstance(default, float) or where.endswith(MAY_BE_FRACTIONS)
    if isinstance(default, bool):
        _demand(isinstance(value, bool), where, "true or false", value)
    elif isinstance(default, str):
        _demand(isinstance(value, str), where, "a text", value)
    elif isinstance(default, list):
        fits = isinstance(value, list) and all(_is_number(item, whole=True, least=0) for item in value)
        _demand(fits, where, "a list of whole numbers", value)
    else:
        size = "above 0" if least is None else f"of at least {least}"
        kind = f"a {'' if fraction else 'whole '}number {size}"
        _demand(_is_number(value, whole=not fraction, least=least), where, kind, value)


def check_fixed(fields: Fields, fixed: Fields, where: str) -> None:
    """Raise ValueError for the first field that asks for something else than the layers compute; null asks for nothing.

    A list has to hold nothing but the fixed value.
    """
    for name, computed in fixed.items():
        asked = fields.get(name)
        values = asked if isinstance(asked, list) else [asked]
        if any(
            value is not None and (isinstance(value, bool) != isinstance(computed, bool) or value != computed)
            for value in values
        ):
            raise ValueError(
                f"{where}{name} is {asked!r}, which is not supported; models of this family are computed with "
                f"{computed!r} alone"
            )


def _is_number(value: Any, *, whole: bool, least: int | None) -> bool:
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        return False
    return math.isfinite(value) and (value > 0 if least is None else value >= least)


def _demand(fits: bool, where: str, kind: str, value: Any) -> None:
    if not fits:
        raise ValueError(f"{where} must be {kind}, got {value!r}")
