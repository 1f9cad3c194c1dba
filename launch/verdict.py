"""What follows from the end of an attempt: pure rules over the record of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_rb.config.failures import EX_CONFIG, EX_DATAERR, EX_TEMPFAIL, WRONG_INPUT
from megatron_rb.launch.record import AttemptNote

CONFIGURATION_CODES = (WRONG_INPUT, EX_CONFIG)
"""Exit codes of a process that found its settings, data or checkpoint wrong."""
NUMBERS_CODES = (EX_DATAERR,)
"""Exit codes of a process whose losses, gradients or weights are not finite."""
ELSEWHERE_CODES = (EX_TEMPFAIL,)
"""Exit codes of a process that asks to be tried on another machine."""
STRIKES = 3
"""Failures in a row on one machine, while the steps differ, that make it a bad one."""


@dataclass(frozen=True)
class Verdict:
    """Whether to try again, why not, and without which machine."""

    retry: bool
    reason: str
    exclude: str = ""


def class_of_exit(code: int) -> str:
    """The kind of failure that an exit code stands for."""
    if code in CONFIGURATION_CODES:
        return "configuration"
    if code in NUMBERS_CODES:
        return "numbers"
    return "node" if code in ELSEWHERE_CODES else "rank"


def judge(attempts: Sequence[AttemptNote], max_retries: int) -> Verdict:
    """Judge the last attempt, which has failed.

    Args:
        attempts: of the whole run, oldest first.
    """
    last = attempts[-1]
    if last.kind == "configuration":
        return Verdict(False, f"{last.cause}; the settings are wrong, so another attempt would fail as well")
    if last.kind == "numbers":
        return Verdict(False, f"{last.cause}; numbers that are not finite would come again, so look at them first")
    exclude = last.node if last.kind == "node" or _strikes(attempts) >= STRIKES else ""
    before = attempts[-2] if len(attempts) > 1 else None
    if before is not None and _same_place(before, last):
        place = f"step {last.last_step + 1}" if last.phase != "init" else "the start"
        return Verdict(False, f"{place} failed twice: {last.cause}; look at the data and code of that step")
    fruitless = _without_progress(attempts)
    if fruitless > max_retries:
        told = "cluster.max_retries is 0" if not max_retries else f"{fruitless} attempts in a row made no checkpoint"
        return Verdict(False, f"{last.cause}; {told}", exclude)
    return Verdict(True, last.cause, exclude)


def _same_place(before: AttemptNote, last: AttemptNote) -> bool:
    """A program that fails at the same step again fails by itself, and not by its machine."""
    by_itself = last.kind in ("rank", "hang") and before.kind == last.kind
    return by_itself and (before.last_step, before.phase) == (last.last_step, last.phase)


def _without_progress(attempts: Sequence[AttemptNote]) -> int:
    """Failed attempts in a row, counted from the last, that began with the same checkpoint."""
    count = 1
    for earlier, later in zip(attempts[-2::-1], attempts[::-1], strict=False):
        if later.resumed_from > earlier.resumed_from or earlier.outcome != "failed":
            break
        count += 1
    return count


def _strikes(attempts: Sequence[AttemptNote]) -> int:
    last, count = attempts[-1], 0
    for note in reversed(attempts):
        if note.outcome != "failed" or not note.node or note.node != last.node:
            break
        count += 1
    return count
