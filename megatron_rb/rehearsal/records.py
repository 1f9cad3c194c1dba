"""What is kept of a rehearsed rank."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rb.rehearsal.launches import Launch
from megatron_rb.rehearsal.messages import Group, Message

LINES = 40
"""Of a peak that are kept."""
KINDS = ("weights", "gradients", "optimizer", "activations", "temporary")
"""What live memory is: temporary = of the backward pass, the reduction of gradients and the optimizer's step."""


@dataclass(frozen=True)
class PeakMemory:
    """The most bytes that lived at once, and what they were."""

    bytes: int
    kinds: dict[str, int]
    """By `KINDS`."""
    lines: list[tuple[str, str, int]]
    """Kind, line and bytes of what was held, the most first."""


@dataclass(frozen=True)
class Phase:
    """What a rank did in its start, a step, an evaluation, a save or a load."""

    name: str
    peak: PeakMemory
    waits: list[tuple[str, str, int]]
    """Kind, line and how often the host waited for the device."""
    messages: list[Message]
    operations: int
    flops: int
    uncounted: int
    """Calls of attention whose FLOPs are not among them: the host does not know their borders."""
    launches: dict[Launch, int]
    """How often Triton kernels were started, by what with."""
    seconds: float
    """CPU time of the rehearsal itself."""


@dataclass(frozen=True)
class CheckpointBytes:
    """What a checkpoint makes a rank, or a machine, move."""

    copied: int
    """From the device to the host while saving."""
    written: int
    read: int
    """While loading."""


@dataclass(frozen=True)
class RehearsedRank:
    """What was seen of one rank."""

    rank: int
    name: str
    pp_rank: int
    groups: list[Group]
    phases: list[Phase]
    """In order: `start`, then every step, `evaluation`, `save` and `load`."""
    sizes: list[tuple[int, int]]
    """Tokens and patches of its micro-batches in the last step, padding included."""
    failure: str = ""
    """What its last phase failed with, and where."""
    checkpoint: CheckpointBytes | None = None
    """None = none was rehearsed."""
