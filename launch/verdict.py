"""What follows from the end of an attempt, and what is kept of it: pure rules over the record of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_rb.launch.failure import FailureKind
from megatron_rb.launch.record import AttemptNote

STRIKES = 3
"""Failures in a row on one machine, while the steps differ, that make it a bad one."""


@dataclass(frozen=True)
class RetryDecision:
    """Whether to try again, why not, and without which machine."""

    retry: bool
    reason: str
    exclude: str = ""


def judge(attempts: Sequence[AttemptNote], max_retries: int) -> RetryDecision:
    """Judge the last attempt, which has failed.

    Args:
        attempts: of the whole run, oldest first.
    """
    last = attempts[-1]
    if last.kind == FailureKind.CONFIGURATION:
        return RetryDecision(False, f"{last.cause}; the settings are wrong, so another attempt would fail as well")
    if last.kind == FailureKind.NUMBERS:
        return RetryDecision(
            False, f"{last.cause}; numbers that are not finite would come again, so look at them first"
        )
    exclude = last.node if last.kind == FailureKind.NODE or _strikes(attempts) >= STRIKES else ""
    before = attempts[-2] if len(attempts) > 1 else None
    if before is not None and _same_place(before, last):
        place = f"step {last.last_step + 1}" if last.phase != "init" else "the start"
        return RetryDecision(False, f"{place} failed twice: {last.cause}; look at the data and code of that step")
    fruitless = _without_progress(attempts)
    if fruitless > max_retries:
        why = "cluster.max_retries is 0" if not max_retries else f"{fruitless} attempts in a row made no checkpoint"
        return RetryDecision(False, f"{last.cause}; {why}", exclude)
    return RetryDecision(True, last.cause, exclude)


def kept(checkpoint: int, last_step: int) -> str:
    """What a run that was stopped has saved, in words.

    Args:
        checkpoint: step of its newest complete checkpoint; 0 = there is none.
        last_step: last step of the attempt that was stopped; 0 = it had done none.
    """
    lost = last_step - checkpoint
    if lost <= 0:
        return f"the run is saved at step {checkpoint}" if checkpoint else "no step was done, and nothing is saved"
    steps = f"step {last_step} is" if lost == 1 else f"steps {checkpoint + 1} to {last_step} are"
    return f"{steps} lost, the newest checkpoint is {f'of step {checkpoint}' if checkpoint else 'none'}"


def _same_place(before: AttemptNote, last: AttemptNote) -> bool:
    """A program that fails at the same step again fails by itself, and not by its machine."""
    by_itself = last.kind in (FailureKind.RANK, FailureKind.HANG) and before.kind == last.kind
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
