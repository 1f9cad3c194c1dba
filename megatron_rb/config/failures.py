"""Ends of a process that its user or its launcher must tell apart, as exit codes (`EX_` as in sysexits.h)."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

WRONG_INPUT = 2
"""Settings, data or checkpoint do not fit, as `rb` says it."""
EX_DATAERR, EX_IOERR, EX_TEMPFAIL, EX_CONFIG = 65, 74, 75, 78
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
"""The disk is full, or the user's share of it."""
PACKAGE = Path(__file__).parents[1]


class NotFinite(Exception):
    """Losses, gradients or weights that are not finite; another attempt from the same weights would fail as well."""

    exit_code = EX_DATAERR


class ProcessFailed(Exception):
    """Processes that this one has started ended with an exit code, which becomes its own."""

    def __init__(self, what: str, exit_code: int) -> None:
        super().__init__(f"{what} ended with exit code {exit_code}; its output stands above")
        self.exit_code = exit_code


def exit_code_of(error: Exception) -> int | None:
    """The exit code of an error that is told in one sentence; None = it was not foreseen and keeps its traceback.

    A ValueError of another package is no wrong input that was foreseen.
    """
    if isinstance(error, NotFinite | ProcessFailed):
        return error.exit_code
    if without_room(error) is not None:
        return EX_IOERR
    if isinstance(error, FileNotFoundError) or isinstance(error, ValueError) and _raised_here(error):
        return WRONG_INPUT
    return None


def without_room(error: BaseException) -> OSError | None:
    """The error of a full disk behind another error, or which it is itself; None = the disk is not full."""
    full = (cause for cause in _causes(error) if isinstance(cause, OSError) and cause.errno in NO_ROOM)
    return next(full, None)


def sentence(error: Exception, place: str = "") -> str:
    """An error in words for its user.

    Args:
        place: folder that was written into, where the error of a full disk does not name its file.
    """
    full = without_room(error)
    if full is None:
        return str(error)
    name = full.filename or place or "a file"
    return f"{name} cannot be written: {full.strerror}; make room there, and the same command goes on"


def complain(error: Exception, place: str = "") -> None:
    """Tell an error to people, on stderr; `place` as `sentence` takes it.

    Wrong input that another process has told already is not told again.
    """
    if isinstance(error, ProcessFailed) and error.exit_code == WRONG_INPUT:
        return
    from rich.console import Console  # only wrong input needs it

    console = Console(stderr=True, soft_wrap=True)
    console.print(f"rb: {sentence(error, place)}", style="bold red", markup=False, highlight=False)
    console.print("(rb --debug shows where this came from)", style="dim", highlight=False)


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _raised_here(error: Exception) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    raised_in = trace.tb_frame.f_code.co_filename if trace is not None else ""
    return Path(raised_in).is_relative_to(PACKAGE)
