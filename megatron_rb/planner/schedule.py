"""megatron-core's pipeline schedules, 1F1B and interleaved 1F1B, played through with a time for every micro-batch.

An exchange ends for a rank when its partners have made theirs: so it is in 1F1B, where messages of both directions are
started together. In the interleaved schedule messages overlap with computing, which is played in the same way and thus
no faster than it is.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

Message = tuple[str, int, int]
"""(`f` or `b`, boundary, micro-batch); boundary k lies between slices k and k + 1."""


class Pass(NamedTuple):
    """A forward (`F`) or backward (`B`) pass of a micro-batch through a slice."""

    kind: str
    slice_index: int
    micro_batch: int


class Exchange(NamedTuple):
    """Messages sent and received at once; it ends when all have arrived."""

    messages: tuple[Message, ...]


class Posted(NamedTuple):
    """A rank has reached an exchange."""

    rank: int
    place: int


class Done(NamedTuple):
    """An exchange of a rank has ended: the places of its partners, and the messages."""

    rank: int
    place: int
    partners: tuple[tuple[int, int, int], ...]
    """(place of the partner's posting, boundary, micro-batch)"""


class Compute(NamedTuple):
    """A rank computes."""

    rank: int
    step: Pass


@dataclass(frozen=True)
class Timing:
    """What a schedule takes; arrays over whatever the durations have beyond slices and micro-batches."""

    makespan: np.ndarray
    """Seconds from the first forward pass to the end of the last backward pass of any rank."""
    busy: np.ndarray
    """`[ranks, ...]`: seconds of computing."""
    ends: np.ndarray
    """`[ranks, ...]`: when the rank has ended its last pass."""

    @property
    def bubble_ratio(self) -> np.ndarray:
        """Share of the pipeline's time in which its ranks do not compute."""
        return 1 - self.busy.mean(axis=0) / np.maximum(self.makespan, 1e-12)


@functools.lru_cache(maxsize=4096)
def rank_program(pp_size: int, vpp_size: int, num_micro_batches: int, rank: int) -> tuple[Pass | Exchange, ...]:
    """What one rank does, in order."""
    if pp_size == 1:
        return tuple(Pass(kind, 0, number) for number in range(num_micro_batches) for kind in "FB")
    build = _one_forward_one_backward if vpp_size == 1 else functools.partial(_interleaved, vpp_size=vpp_size)
    return tuple(build(pp_size, num_micro_batches=num_micro_batches, rank=rank))


def _one_forward_one_backward(pp_size: int, *, num_micro_batches: int, rank: int) -> list[Pass | Exchange]:
    """`forward_backward_pipelining_without_interleaving`."""
    first, last = rank == 0, rank == pp_size - 1
    warmup = min(pp_size - rank - 1, num_micro_batches)
    remaining = num_micro_batches - warmup
    program: list[Pass | Exchange] = []

    def exchange(*messages: Message | None) -> None:
        kept = tuple(message for message in messages if message is not None)
        if kept:
            program.append(Exchange(kept))

    def forward_in(number: int) -> Message | None:
        return None if first else ("f", rank - 1, number)

    def forward_out(number: int) -> Message | None:
        return None if last else ("f", rank, number)

    def backward_in(number: int) -> Message | None:
        return None if last else ("b", rank, number)

    def backward_out(number: int) -> Message | None:
        return None if first else ("b", rank - 1, number)

    for number in range(warmup):
        exchange(forward_in(number))
        program.append(Pass("F", rank, number))
        exchange(forward_out(number))
    if remaining:
        exchange(forward_in(warmup))
    for number in range(remaining):
        program.append(Pass("F", rank, warmup + number))
        exchange(forward_out(warmup + number), backward_in(number))
        program.append(Pass("B", rank, number))
        more = number < remaining - 1
        exchange(backward_out(number), forward_in(warmup + number + 1) if more else None)
    for number in range(remaining, num_micro_batches):
        exchange(backward_in(number))
        program.append(Pass("B", rank, number))
        exchange(backward_out(number))
    return program


def _order(pp_size: int, vpp_size: int, num_micro_batches: int) -> list[tuple[int, int]]:
    """(micro-batch, chunk) of every forward pass of a rank: groups of `pp_size` micro-batches, chunk by chunk."""
    order = []
    for start in range(0, num_micro_batches, pp_size):
        group = range(start, min(start + pp_size, num_micro_batches))
        order += [(number, chunk) for chunk in range(vpp_size) for number in group]
    return order


def _interleaved(pp_size: int, *, vpp_size: int, num_micro_batches: int, rank: int) -> list[Pass | Exchange]:
    """`forward_backward_pipelining_with_interleaving` with `overlap_p2p_comm` and shapes exchanged."""
    order = _order(pp_size, vpp_size, num_micro_batches)
    total, last_slice = len(order), pp_size * vpp_size - 1
    warmup = min((pp_size - rank - 1) * 2 + (vpp_size - 1) * pp_size, total)
    program: list[Pass | Exchange] = []

    def forward(k: int) -> Pass:
        number, chunk = order[k]
        return Pass("F", chunk * pp_size + rank, number)

    def backward(k: int) -> Pass:
        number, chunk = order[k]
        return Pass("B", (vpp_size - 1 - chunk) * pp_size + rank, number)

    def sent(step: Pass) -> Message | None:
        if step.kind == "F":
            return None if step.slice_index == last_slice else ("f", step.slice_index, step.micro_batch)
        return None if step.slice_index == 0 else ("b", step.slice_index - 1, step.micro_batch)

    def received(k: int, kind: str) -> Message | None:
        """What is received after step k: the input of the next step, or on the leading rank what comes around."""
        step, leading = (forward, rank == 0) if kind == "F" else (backward, rank == pp_size - 1)
        if not leading:
            return _input_of(step(k + 1), last_slice) if k + 1 < total else None
        if k < pp_size - 1:
            return None
        number, chunk = order[k - (pp_size - 1)]
        if chunk == vpp_size - 1:
            return None
        if kind == "F":
            return ("f", chunk * pp_size + pp_size - 1, number)
        return ("b", (vpp_size - 1 - chunk) * pp_size - 1, number)

    def exchange(*messages: Message | None) -> None:
        kept = tuple(message for message in messages if message is not None)
        if kept:
            program.append(Exchange(kept))

    exchange(_input_of(forward(0), last_slice) if rank else None)
    for k in range(warmup):
        program.append(forward(k))
        exchange(sent(forward(k)), received(k, "F") if k < total - 1 else None)
    first_gradient = None if rank == pp_size - 1 else _input_of(backward(0), last_slice)
    if warmup < total:
        exchange(first_gradient)
    for k in range(total - warmup):
        program.append(forward(k + warmup))
        more = k < total - warmup - 1
        exchange(sent(forward(k + warmup)), received(k + warmup, "F") if more else None)
        program.append(backward(k))
        exchange(sent(backward(k)), received(k, "B"))
    if warmup == total:
        exchange(first_gradient)
    for k in range(total - warmup, total):
        program.append(backward(k))
        exchange(sent(backward(k)), received(k, "B") if k < total - 1 else None)
    return program


def _input_of(step: Pass, last_slice: int) -> Message | None:
    if step.kind == "F":
        return None if step.slice_index == 0 else ("f", step.slice_index - 1, step.micro_batch)
    return None if step.slice_index == last_slice else ("b", step.slice_index, step.micro_batch)


@functools.lru_cache(maxsize=256)
def compiled(pp_size: int, vpp_size: int, num_micro_batches: int) -> tuple[Compute | Posted | Done, ...]:
    """The programs of all ranks in one order in which everything that is needed has happened before.

    Raises:
        RuntimeError: the programs wait for each other.
    """
    programs = [rank_program(pp_size, vpp_size, num_micro_batches, rank) for rank in range(pp_size)]
    places = [0] * pp_size
    posted: dict[Message, dict[int, int]] = defaultdict(dict)
    waiting = [False] * pp_size
    order: list[Compute | Posted | Done] = []
    number = 0
    own_place = [0] * pp_size
    moved = True
    while moved:
        moved = False
        for rank, program in enumerate(programs):
            while places[rank] < len(program):
                step = program[places[rank]]
                if isinstance(step, Pass):
                    order.append(Compute(rank, step))
                else:
                    if not waiting[rank]:
                        waiting[rank], own_place[rank], moved = True, number, True
                        order.append(Posted(rank, number))
                        for message in step.messages:
                            posted[message][rank] = number
                        number += 1
                    partners = tuple(
                        (place, message[1], message[2])
                        for message in step.messages
                        for other, place in posted[message].items()
                        if other != rank
                    )
                    if len(partners) < len(step.messages):
                        break
                    order.append(Done(rank, own_place[rank], partners))
                    waiting[rank] = False
                places[rank] += 1
                moved = True
    if any(place < len(program) for place, program in zip(places, programs, strict=True)):
        raise RuntimeError(f"the schedule of pp {pp_size}, vpp {vpp_size}, {num_micro_batches} micro-batches hangs")
    return tuple(order)


def simulate(
    pp_size: int,
    vpp_size: int,
    forward: np.ndarray,
    backward: np.ndarray,
    transfer: np.ndarray,
    events: list[tuple[int, Pass, float, float]] | None = None,
) -> Timing:
    """Play a step through.

    Args:
        forward, backward: seconds, `[slices, micro-batches, ...]`.
        transfer: seconds to move what crosses each boundary, `[slices - 1, micro-batches, ...]`.
        events: filled with (rank, pass, start, end) when given; durations must then have no further axes.
    """
    shape = forward.shape[2:]
    clock = [np.zeros(shape) for _ in range(pp_size)]
    if pp_size == 1:
        total = (forward + backward).sum(axis=(0, 1))
        if events is not None:
            _events_of_one_stage(forward, backward, events)
        return Timing(total, total[None], total[None])
    times = {}
    for step in compiled(pp_size, vpp_size, forward.shape[1]):
        if isinstance(step, Compute):
            kind, number, batch = step.step
            start = clock[step.rank]
            clock[step.rank] = start + (forward if kind == "F" else backward)[number, batch]
            if events is not None:
                events.append((step.rank, step.step, float(start), float(clock[step.rank])))
        elif isinstance(step, Posted):
            times[step.place] = clock[step.rank]
        else:
            own = times[step.place]
            arrivals = [np.maximum(own, times[place]) + transfer[cut, batch] for place, cut, batch in step.partners]
            clock[step.rank] = functools.reduce(np.maximum, arrivals)
    ends = np.stack(clock)
    busy = (forward + backward).sum(axis=1).reshape(vpp_size, pp_size, *shape).sum(axis=0)
    return Timing(ends.max(axis=0), busy, ends)


def _events_of_one_stage(forward: np.ndarray, backward: np.ndarray, events: list) -> None:
    now = 0.0
    for batch in range(forward.shape[1]):
        for kind, durations in (("F", forward), ("B", backward)):
            end = now + float(durations[0, batch])
            events.append((0, Pass(kind, 0, batch), now, end))
            now = end


@functools.lru_cache(maxsize=1024)
def most_in_flight(pp_size: int, vpp_size: int, num_micro_batches: int, rank: int) -> np.ndarray:
    """Micro-batches whose activations a rank holds at once, `[moments, chunks]`: the moments no other one exceeds."""
    if num_micro_batches > 4 * pp_size:
        # The middle of a step repeats itself every pp_size micro-batches.
        return most_in_flight(pp_size, vpp_size, 4 * pp_size, rank)
    held = [0] * vpp_size
    seen = set()
    for step in rank_program(pp_size, vpp_size, num_micro_batches, rank):
        if isinstance(step, Pass):
            held[step.slice_index // pp_size] += 1 if step.kind == "F" else -1
            if step.kind == "F":
                seen.add(tuple(held))
    moments = np.array(sorted(seen))
    beaten = [(moments >= row).all(axis=1).sum() > 1 for row in moments]
    return moments[~np.array(beaten)]
