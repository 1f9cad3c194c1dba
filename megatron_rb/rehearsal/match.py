"""All rehearsed ranks against each other: does every message meet its other side, and does nobody wait for ever?"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from megatron_rb.rehearsal.messages import BETWEEN_TWO, Group, Message

OTHER_SIDE = {"send": "recv_", "recv_": "send"}


@dataclass(frozen=True)
class Transcript:
    """What one rank said, in order."""

    rank: int
    groups: Mapping[str, Group]
    messages: Sequence[Message]


@dataclass(frozen=True)
class Defect:
    """Something that would hang or spoil a run."""

    kind: str
    """`groups`, `collective`, `message`, `order` or `deadlock`; `kernel` for one that does not compile."""
    text: str


def defects(transcripts: Sequence[Transcript]) -> list[Defect]:
    """What does not fit together between the rehearsed ranks; ranks that were not rehearsed are taken to fit."""
    by_rank = {transcript.rank: transcript for transcript in transcripts}
    found = [*_groups(transcripts), *_collectives(by_rank), *_messages(by_rank), *_orders(by_rank)]
    return found + _Play(by_rank).run()


def _groups(transcripts: Sequence[Transcript]) -> Iterator[Defect]:
    """Every member of a group must know it by the same name, with the same members and backend."""
    known: dict[str, tuple[int, Group]] = {}
    for transcript in transcripts:
        for name, group in transcript.groups.items():
            rank, first = known.setdefault(name, (transcript.rank, group))
            if (first.ranks, first.backend) != (group.ranks, group.backend):
                yield Defect(
                    "groups",
                    f"group {name} is {_ranks(first.ranks)} over {first.backend} on rank {rank} ({first.site}) and "
                    f"{_ranks(group.ranks)} over {group.backend} on rank {transcript.rank} ({group.site})",
                )


def _collectives(by_rank: Mapping[int, Transcript]) -> Iterator[Defect]:
    """The members of a group must call the same collectives in the same order."""
    calls: dict[str, dict[int, list[Message]]] = defaultdict(dict)
    for rank, transcript in by_rank.items():
        for name in transcript.groups:
            calls[name][rank] = []
        for message in transcript.messages:
            if message.kind not in BETWEEN_TWO:
                calls[message.group][rank].append(message)
    for name, of_ranks in calls.items():
        first, *others = sorted(of_ranks)
        group = by_rank[first].groups[name]
        for other in others:
            difference = _difference(of_ranks[first], of_ranks[other])
            if difference is not None:
                number, one, two = difference
                yield Defect(
                    "collective",
                    f"call {number + 1} on group {name} of {_ranks(group.ranks)}: rank {first} {_said(one)}, "
                    f"rank {other} {_said(two)}",
                )


def _difference(one: Sequence[Message], two: Sequence[Message]) -> tuple[int, Message | None, Message | None] | None:
    for number, (a, b) in enumerate(zip_longest(one, two)):
        if a is None or b is None or _meaning(a) != _meaning(b):
            return number, a, b
    return None


def _meaning(message: Message) -> tuple[object, ...]:
    return message.kind, message.dtype, message.device, message.values, message.peer


def _messages(by_rank: Mapping[int, Transcript]) -> Iterator[Defect]:
    """The n-th message from a rank to another must be the n-th that the other expects from it."""
    sent: dict[tuple[str, int, int], list[Message]] = defaultdict(list)
    expected: dict[tuple[str, int, int], list[Message]] = defaultdict(list)
    for rank, transcript in by_rank.items():
        for message in transcript.messages:
            if message.kind == "send":
                sent[message.group, rank, message.peer].append(message)
            elif message.kind == "recv_":
                expected[message.group, message.peer, rank].append(message)
    for key in sorted({*sent, *expected}):
        group, source, target = key
        if source not in by_rank or target not in by_rank:
            continue
        for number, (a, b) in enumerate(zip_longest(sent[key], expected[key])):
            if a is None or b is None or (a.dtype, a.values) != (b.dtype, b.values):
                yield Defect(
                    "message",
                    f"message {number + 1} from rank {source} to rank {target} on group {group}: rank {source} "
                    f"{_said(a)}, rank {target} {_said(b)}",
                )
                break


def _orders(by_rank: Mapping[int, Transcript]) -> Iterator[Defect]:
    """Messages that are not started together share a queue with those of the other direction, so their order counts."""
    pairs: dict[tuple[str, int, int], dict[int, list[Message]]] = defaultdict(lambda: defaultdict(list))
    for rank, transcript in by_rank.items():
        for message in transcript.messages:
            if message.kind in BETWEEN_TWO and not message.batch and message.device != "cpu":
                low, high = sorted((rank, message.peer))
                pairs[message.group, low, high][rank].append(message)
    for (group, low, high), sides in pairs.items():
        for number, (a, b) in enumerate(zip(sides[low], sides[high], strict=False)):
            if a.kind != OTHER_SIDE[b.kind]:
                yield Defect(
                    "order",
                    f"between ranks {low} and {high} on group {group}, message {number + 1}: rank {low} {_said(a)} "
                    f"while rank {high} {_said(b)}",
                )
                break


@dataclass
class _Step:
    """Calls that a rank makes at once and, if they block, waits for."""

    messages: list[Message]
    waits: bool


class _Play:
    """Plays all ranks at once: a call that blocks ends when all its rehearsed sides have made theirs."""

    def __init__(self, by_rank: Mapping[int, Transcript]) -> None:
        self.by_rank = by_rank
        self.steps = {rank: list(_steps(transcript.messages)) for rank, transcript in by_rank.items()}
        self.at = dict.fromkeys(by_rank, 0)
        self.made: Counter[tuple[str, ...]] = Counter()
        self.needs: dict[int, list[tuple[tuple[str, ...], int]]] = {}

    def run(self) -> list[Defect]:
        moved = True
        while moved:
            moved = False
            for rank in self.by_rank:
                while self._advance(rank):
                    moved = True
        stuck = [rank for rank in self.by_rank if self.at[rank] < len(self.steps[rank])]
        if not stuck:
            return []
        words = [f"rank {rank} in {_said(self.steps[rank][self.at[rank]].messages[0], 'calls')}" for rank in stuck[:4]]
        more = f" and {len(stuck) - 4} more" if len(stuck) > 4 else ""
        return [Defect("deadlock", f"{len(stuck)} ranks wait for ever: {'; '.join(words)}{more}")]

    def _advance(self, rank: int) -> bool:
        if self.at[rank] >= len(self.steps[rank]):
            return False
        step = self.steps[rank][self.at[rank]]
        if rank not in self.needs:
            needs = [need for message in step.messages for need in self._make(rank, message)]
            self.needs[rank] = needs if step.waits else []
        if any(self.made[key] < count for key, count in self.needs[rank]):
            return False
        del self.needs[rank]
        self.at[rank] += 1
        return True

    def _make(self, rank: int, message: Message) -> list[tuple[tuple[str, ...], int]]:
        """Count a call; what has to be counted before it is done."""
        if message.kind in BETWEEN_TWO:
            own = (message.kind, message.group, str(rank), str(message.peer))
            other = (OTHER_SIDE[message.kind], message.group, str(message.peer), str(rank))
            self.made[own] += 1
            return [(other, self.made[own])] if message.peer in self.by_rank else []
        call = ("", message.group, str(rank))
        self.made[call] += 1
        members = self.by_rank[rank].groups[message.group].ranks
        return [(("", message.group, str(member)), self.made[call]) for member in members if member in self.by_rank]


def _steps(messages: Sequence[Message]) -> Iterator[_Step]:
    number = 0
    while number < len(messages):
        message = messages[number]
        together = [message]
        while message.batch and number + 1 < len(messages) and messages[number + 1].batch == message.batch:
            number += 1
            together.append(messages[number])
        yield _Step(together, message.blocks)
        number += 1


def _said(message: Message | None, verb: str = "calls") -> str:
    if message is None:
        return "makes no such call"
    to = {"send": f" to rank {message.peer}", "recv_": f" from rank {message.peer}"}.get(message.kind, "")
    what = f" of {message.values} {message.dtype} on {message.device}" if message.dtype else ""
    return f"{verb} {message.kind.strip('_')}{to}{what} at {message.site}"


def _ranks(ranks: Sequence[int]) -> str:
    if len(ranks) <= 4:
        return f"ranks {', '.join(map(str, ranks))}"
    return f"{len(ranks)} ranks {ranks[0]}, {ranks[1]} .. {ranks[-1]}"
