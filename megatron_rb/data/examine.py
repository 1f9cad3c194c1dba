"""One line of a data file -> the samples it holds, or why it holds none."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from rich.progress import Progress

from megatron_rb.data.conversation import Conversation
from megatron_rb.data.encoder import SampleEncoder
from megatron_rb.data.media import MediaInfo
from megatron_rb.data.packing import Budget
from megatron_rb.data.problems import BadSample, refusing_the_unexpected
from megatron_rb.data.prompt import RewrittenTurns, learned_turns
from megatron_rb.data.rows import parse_line
from megatron_rb.data.sample import IGNORED

LINES_AT_ONCE = 256
WHOLE_ROW = -1


@dataclass(frozen=True)
class IndexRules:
    """What a row has to pass."""

    limits: Budget
    """Of one sample."""
    media_root: str
    """Folder that relative paths start from; empty = the folder of the jsonl file."""
    decode_media: bool
    """Decode every pixel once, instead of reading headers only."""

    def root_of(self, file: str) -> Path:
        return Path(self.media_root) if self.media_root else Path(file).parent


@dataclass(frozen=True)
class FileLine:
    file: int
    number: int
    """From 1."""
    offset: int
    content: bytes

    @property
    def place(self) -> tuple[int, int, int, int]:
        return self.file, self.number, self.offset, len(self.content)


@dataclass(frozen=True)
class Entry:
    """A usable sample."""

    turn: int
    """The assistant turn that is learned, or WHOLE_ROW."""
    size: tuple[int, int]
    """Tokens and patches."""
    media: list[MediaInfo]


@dataclass(frozen=True)
class Refused:
    sample_id: str
    problem: BadSample
    by_media: bool = False
    """The row itself is fine: with other media it may pass."""


@dataclass(frozen=True)
class Examined:
    line: FileLine
    found: list[Entry | Refused]
    unread: tuple[str, ...] = ()
    """Keys that mean nothing here."""


def lines_of(files: Iterable[str]) -> Iterator[FileLine]:
    """Every line of the files that is not empty."""
    for number, name in enumerate(files):
        offset = 0
        with open(name, "rb") as file:
            for count, content in enumerate(file, start=1):
                if content.strip():
                    yield FileLine(number, count, offset, content)
                offset += len(content)


def lines_at(places: Iterable[Sequence[int]], files: Sequence[str]) -> Iterator[FileLine]:
    """Lines by file number, line number, byte offset and length."""
    for file, number, offset, length in places:
        with open(files[file], "rb") as opened:
            yield FileLine(file, number, offset, os.pread(opened.fileno(), length, offset))


def examine_all(
    lines: Iterator[FileLine],
    files: Sequence[str],
    encoder: SampleEncoder,
    rules: IndexRules,
    threads: int,
    progress: bool,
) -> Iterator[Examined]:
    """Look at every line, several at a time, in order."""
    total = sum(os.path.getsize(file) for file in files)
    with Progress(transient=True, disable=not progress) as bar, ThreadPoolExecutor(threads) as pool:
        task = bar.add_task("reading samples", total=total)
        while group := list(islice(lines, LINES_AT_ONCE)):
            yield from pool.map(lambda line: examine(line, files[line.file], encoder, rules), group)
            bar.advance(task, sum(len(line.content) for line in group))


def examine(line: FileLine, file: str, encoder: SampleEncoder, rules: IndexRules) -> Examined:
    """Read a line, look at its media, and measure what it gives; whatever goes wrong is its refusal."""
    name = default_id(file, line.number)
    try:
        with refusing_the_unexpected():
            conversation = parse_line(line.content, name, rules.root_of(file))
    except BadSample as problem:
        return Examined(line, [Refused(name, problem)])
    return Examined(line, _samples(conversation, encoder, rules), conversation.unread)


def default_id(file: str, line: int) -> str:
    """Name of a row that brings no id."""
    return f"{Path(file).stem}:{line}"


def _samples(conversation: Conversation, encoder: SampleEncoder, rules: IndexRules) -> list[Entry | Refused]:
    try:
        with refusing_the_unexpected():
            infos = encoder.inspect(conversation)
            if rules.decode_media:
                encoder.pixels(conversation, infos)
            return [_entry(conversation, infos, encoder, rules)]
    except RewrittenTurns as problem:
        turns = learned_turns(conversation.turns, encoder.loss_turns)
        return [_turn(conversation, turn, infos, encoder, rules) for turn in turns] or [
            Refused(conversation.sample_id, problem)
        ]
    except BadSample as problem:
        return [Refused(conversation.sample_id, problem, bool(conversation.media))]


def _turn(
    conversation: Conversation, turn: int, infos: list[MediaInfo], encoder: SampleEncoder, rules: IndexRules
) -> Entry | Refused:
    """One turn of a conversation whose turns share no sequence, as a sample of its own."""
    sample = conversation.until(turn)
    try:
        with refusing_the_unexpected():
            return _entry(sample, infos[: len(sample.media)], encoder, rules, turn)
    except BadSample as problem:
        return Refused(sample.sample_id, problem)


def _entry(
    conversation: Conversation, infos: list[MediaInfo], encoder: SampleEncoder, rules: IndexRules, turn: int = WHOLE_ROW
) -> Entry:
    sample = encoder.encode(conversation, infos, rules.limits.tokens)
    size = (len(sample.input_ids), sample.num_patches)
    _check_size(size, rules.limits)
    if (sample.labels == IGNORED).all():
        raise BadSample("nothing to learn", "no token of the assistant turns is learned")
    return Entry(turn, size, infos)


def _check_size(size: tuple[int, int], limits: Budget) -> None:
    tokens, patches = size
    if tokens > limits.tokens:
        raise BadSample("too many tokens", f"{tokens} tokens do not fit data.seq_length {limits.tokens}")
    if patches > limits.patches:
        raise BadSample("too many patches", f"{patches} vision patches do not fit data.max_patches {limits.patches}")
