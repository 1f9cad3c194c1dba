"""Why a row cannot be trained on."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)

LONGEST_MESSAGE = 500
"""Characters of a message; a row may hold a whole picture as text, which neither ledger nor console should repeat."""
LONGEST_VALUE = 80
READER_ERROR = "reader error"
_logged: set[str] = set()
"""Kinds of unexpected errors whose traceback is in the log already."""


class BadSample(ValueError):
    """A row or its media that cannot be used; the message is one sentence for the ledger."""

    def __init__(self, problem: str, message: str) -> None:
        super().__init__(shortened(message))
        self.problem = problem
        """A few words that rows with the same fault share, for counting."""


class NoUsableSample(ValueError):
    """Every row of some data files was refused."""


def shortened(text: str, longest: int = LONGEST_MESSAGE) -> str:
    """Begin and end of a long text, with its length; halves of characters, which no file can hold, are written out."""
    text = text.encode(errors="backslashreplace").decode()
    if len(text) <= longest:
        return text
    return f"{text[: longest * 2 // 3]} ... {text[-longest // 6 :]} ({len(text):,} characters)"


def quoted(value: object) -> str:
    """A value of a row as a message shows it: its `repr`, and only the begin of a long one."""
    if isinstance(value, str | bytes) and len(value) > LONGEST_VALUE:
        unit = "characters" if isinstance(value, str) else "bytes"
        return f"{value[: LONGEST_VALUE // 2]!r}... ({len(value):,} {unit})"
    if isinstance(value, list | tuple | dict) and len(value) > LONGEST_VALUE:
        return f"a {type(value).__name__} of {len(value):,}"
    try:
        return shortened(repr(value), LONGEST_VALUE)
    except (RecursionError, ValueError):  # nested too deep, or an integer of thousands of digits
        return f"a {type(value).__name__}"


@contextmanager
def refusing_the_unexpected() -> Iterator[None]:
    """Whatever a row makes the code inside raise becomes its refusal, so that one row cannot end a run.

    An error that no reader raises on purpose counts as a `reader error`; the first of each kind is in the debug log
    with its traceback, since it is as likely a fault of the product as one of the row.
    """
    try:
        yield
    except BadSample:
        raise
    except Exception as error:
        if isinstance(error, ImportError) or isinstance(error.__cause__, ImportError):
            raise  # a package that is missing is no fault of the row
        _log_first(error)
        raise BadSample(READER_ERROR, f"{type(error).__name__}: {error}") from error


def _log_first(error: Exception) -> None:
    kind = type(error).__name__
    if kind not in _logged:
        _logged.add(kind)
        log.debug("a row could not be examined; further errors of this kind are only counted", exc_info=error)
