"""Why an attempt failed: the kinds of failure, and what exit codes and silent ranks say."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from enum import Enum

from megatron_rb.config.failures import EX_CONFIG, EX_DATAERR, EX_IOERR, EX_TEMPFAIL, WRONG_INPUT
from megatron_rb.launch.beats import Hang

TIMED_OUT = 124
"""Exit code of a run that hung, as that of `timeout`."""


class FailureKind(str, Enum):
    """The values stand in `run.json`."""

    CONFIGURATION = "configuration"
    """A process found its settings, data or checkpoint wrong."""
    NUMBERS = "numbers"
    """Losses, gradients or weights are not finite."""
    RANK = "rank"
    """A process ended by itself."""
    HANG = "hang"
    """A process made no progress."""
    NODE = "node"
    """A machine is gone, or a process asks to be tried on another one."""
    START = "start"
    """No machine could start its processes."""

    __str__ = str.__str__


KIND_OF_EXIT = {
    WRONG_INPUT: FailureKind.CONFIGURATION,
    EX_CONFIG: FailureKind.CONFIGURATION,
    EX_DATAERR: FailureKind.NUMBERS,
    EX_TEMPFAIL: FailureKind.NODE,
}
"""By the exit code of a process; any other is a rank that ended by itself."""


@dataclass(frozen=True)
class Failure:
    """Why an attempt failed."""

    kind: FailureKind
    text: str
    code: int = 1
    rank: int | None = None
    node: str = ""
    phase: str = ""


def kind_of_exit(code: int) -> FailureKind:
    """The kind of failure that an exit code other than 0 stands for."""
    return KIND_OF_EXIT.get(code, FailureKind.RANK)


def failure_of_exit(rank: int, node: str, code: int, phase: str, step: int) -> Failure:
    """Of a rank that has ended with a code other than 0, in a phase and after a step."""
    text = f"rank {rank} on {node} {describe_exit(code)} after step {step}"
    return Failure(kind_of_exit(code), text, code, rank, node, phase)


def failure_of_hang(hang: Hang, node: str, stacks: str) -> Failure:
    """Of a rank without progress.

    Args:
        stacks: folder that gets the stacks of all ranks, in words.
    """
    text = (
        f"rank {hang.rank} on {node} made no progress for {hang.seconds:.0f} s in phase '{hang.phase}' after step "
        f"{hang.step} (limit {hang.limit:.0f} s); stacks of all ranks are in {stacks}"
    )
    return Failure(FailureKind.HANG, text, TIMED_OUT, hang.rank, node, hang.phase)


def describe_exit(code: int) -> str:
    """What an exit code says, in words.

    Args:
        code: 128 + the signal for a process that died of one, as a shell has it.
    """
    if code == EX_IOERR:
        return f"found no room on the disk (exit code {code})"
    name = signal_name(code - 128) if code > 128 else ""
    if not name:
        return f"failed with exit code {code}"
    hint = " (often: the machine ran out of memory)" if code - 128 == signal.SIGKILL else ""
    return f"was killed by {name}{hint}"


def signal_name(signum: int) -> str:
    """Empty for a number that no signal has."""
    try:
        return signal.Signals(signum).name
    except ValueError:
        return ""
