"""Which modules of a model a user means: names as peft takes them (`q_proj`), patterns, and all of them."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase

ALL_LINEAR = "all-linear"
"""Every linear that takes low-rank factors; peft's word."""
NEAREST = 3


def matching(pattern: str, names: Sequence[str]) -> list[str]:
    """The names that a pattern means: a whole name, its last words (`self_attn.q_proj`), or `*` for any letters."""
    if pattern == ALL_LINEAR:
        return list(names)
    if any(letter in pattern for letter in "*?["):
        return [name for name in names if fnmatchcase(name, pattern)]
    return [name for name in names if f".{name}".endswith(f".{pattern}")]


def nearest(pattern: str, names: Sequence[str]) -> list[str]:
    """Last words of names that look like a pattern that means none."""
    words = pattern.strip("*").rpartition(".")[2].strip("*") or pattern
    last = sorted({name.rpartition(".")[2] for name in names})
    return difflib.get_close_matches(words, last, NEAREST, 0.4) or last[:NEAREST]
