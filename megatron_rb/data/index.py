"""The index of a data set: where each usable row is and how large it is, found without keeping pixels."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from rich.progress import Progress

from megatron_rb.data.encoder import NO_LOSS, SampleEncoder
from megatron_rb.data.ledger import Ledger
from megatron_rb.data.media import MediaInfo
from megatron_rb.data.packing import Budget
from megatron_rb.data.problems import BadSample, NoUsableSample
from megatron_rb.data.rows import parse_line

log = logging.getLogger(__name__)

LINES_AT_ONCE = 256


@dataclass(frozen=True)
class Index:
    """One entry per usable row, as arrays so that millions of rows stay small and can be kept on disk."""

    files: tuple[str, ...]
    places: np.ndarray
    """int64 `[rows, 4]`: file number, line number from 1, byte offset, length in bytes."""
    sizes: np.ndarray
    """int64 `[rows, 2]`: tokens and patches."""
    media_starts: np.ndarray
    """int64 `[rows + 1]`: where the media of each row begin in `media`."""
    media: np.ndarray
    """float64 `[media, 5]`: the fields of `MediaInfo` but its time stamps."""
    stamp_starts: np.ndarray
    """int64 `[media + 1]`: where the time stamps of each of the media begin in `stamps`."""
    stamps: np.ndarray
    """float64: time stamps of the videos whose rate varies."""
    rejected: dict[str, int]
    """Rows left out, by problem."""

    def __len__(self) -> int:
        return len(self.places)

    def media_infos(self, row: int) -> list[MediaInfo]:
        """What the headers of a row's media said when it was indexed."""
        return [self._media_info(number) for number in range(self.media_starts[row], self.media_starts[row + 1])]

    def _media_info(self, number: int) -> MediaInfo:
        height, width, frames, fps, given = self.media[number].tolist()
        stamps = self.stamps[self.stamp_starts[number] : self.stamp_starts[number + 1]]
        return MediaInfo(int(height), int(width), int(frames), fps, bool(given), tuple(stamps.tolist()))

    def save(self, path: Path) -> None:
        """Write all of it to one file, which appears complete or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        with unfinished.open("wb") as file:
            np.savez(
                file, files=np.array(self.files), places=self.places, sizes=self.sizes,
                media_starts=self.media_starts, media=self.media, stamp_starts=self.stamp_starts,
                stamps=self.stamps, rejected=np.array(json.dumps(self.rejected)),
            )  # fmt: skip
        unfinished.replace(path)


def load_index(path: Path) -> Index:
    """Read what `Index.save` wrote."""
    with np.load(path, allow_pickle=False) as arrays:
        return Index(
            files=tuple(str(name) for name in arrays["files"]),
            places=arrays["places"],
            sizes=arrays["sizes"],
            media_starts=arrays["media_starts"],
            media=arrays["media"],
            stamp_starts=arrays["stamp_starts"],
            stamps=arrays["stamps"],
            rejected=json.loads(str(arrays["rejected"])),
        )


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
class _Line:
    file: int
    number: int
    offset: int
    content: bytes


@dataclass(frozen=True)
class _Entry:
    line: _Line
    size: tuple[int, int]
    media: list[MediaInfo]


@dataclass(frozen=True)
class _Rejected:
    line: _Line
    sample_id: str
    problem: BadSample


def build_index(
    files: Sequence[str], encoder: SampleEncoder, rules: IndexRules, ledger: Ledger, *, threads: int, progress: bool
) -> Index:
    """Look at every row once; each row that cannot be used becomes a line of the ledger.

    Args:
        threads: rows that are looked at together.
        progress: show a progress bar.

    Raises:
        ValueError: a file is missing.
        NoUsableSample: no row of all the files is usable.
    """
    for file in files:
        if not Path(file).is_file():
            raise ValueError(f"no data file {file}; data.train and data.evaluation name jsonl files")
    entries: list[_Entry] = []
    rejected: Counter[str] = Counter()
    first = "they hold no rows"
    for result in _examine_all(files, encoder, rules, threads, progress):
        if isinstance(result, _Entry):
            entries.append(result)
            continue
        file, problem = files[result.line.file], result.problem
        if not rejected:
            first = f"the first, {file} line {result.line.number}: {problem}"
        rejected[problem.problem] += 1
        ledger.record(
            "rejected", file, str(problem), line=result.line.number, id=result.sample_id, problem=problem.problem
        )
    if not entries:
        raise NoUsableSample(
            f"no usable sample in {', '.join(files) or 'an empty list of files'} ({describe(rejected)}); {first}; "
            f"see {ledger.path}"
        )
    return _arrays(files, entries, rejected)


def describe(rejected: dict[str, int]) -> str:
    """Counts of refused rows in words."""
    parts = [f"{count} {problem}" for problem, count in sorted(rejected.items(), key=lambda item: -item[1])]
    return f"{sum(rejected.values())} rows refused: {', '.join(parts)}" if parts else "no rows refused"


def _arrays(files: Sequence[str], entries: list[_Entry], rejected: Counter[str]) -> Index:
    lines = [entry.line for entry in entries]
    media = [info for entry in entries for info in entry.media]
    sizes = [(info.height, info.width, info.frames, info.fps, info.given_frames) for info in media]
    return Index(
        files=tuple(files),
        places=np.array([(x.file, x.number, x.offset, len(x.content)) for x in lines], dtype=np.int64),
        sizes=np.array([entry.size for entry in entries], dtype=np.int64),
        media_starts=np.cumsum([0] + [len(entry.media) for entry in entries]).astype(np.int64),
        media=np.array(sizes, dtype=np.float64).reshape(-1, 5),
        stamp_starts=np.cumsum([0] + [len(info.stamps) for info in media]).astype(np.int64),
        stamps=np.array([second for info in media for second in info.stamps], dtype=np.float64),
        rejected=dict(rejected),
    )


def _examine_all(
    files: Sequence[str], encoder: SampleEncoder, rules: IndexRules, threads: int, progress: bool
) -> Iterator[_Entry | _Rejected]:
    total = sum(os.path.getsize(file) for file in files)
    lines = _lines(files)
    with Progress(transient=True, disable=not progress) as bar, ThreadPoolExecutor(threads) as pool:
        task = bar.add_task("reading samples", total=total)
        while group := list(islice(lines, LINES_AT_ONCE)):
            yield from pool.map(lambda line: _examine(line, files, encoder, rules), group)
            bar.advance(task, sum(len(line.content) for line in group))


def _lines(files: Iterable[str]) -> Iterator[_Line]:
    for number, name in enumerate(files):
        offset = 0
        with open(name, "rb") as file:
            for count, content in enumerate(file, start=1):
                if content.strip():
                    yield _Line(number, count, offset, content)
                offset += len(content)


def _examine(line: _Line, files: Sequence[str], encoder: SampleEncoder, rules: IndexRules) -> _Entry | _Rejected:
    file = files[line.file]
    sample_id = default_id(file, line.number)
    try:
        conversation = parse_line(line.content, sample_id, rules.root_of(file))
        sample_id = conversation.sample_id
        infos = encoder.inspect(conversation)
        sample = encoder.encode(conversation, infos)
        size = (len(sample.input_ids), sample.num_patches)
        _check_size(size, rules.limits)
        if (sample.labels == NO_LOSS).all():
            raise BadSample("nothing to learn", "no token of the assistant turns is learned")
        if rules.decode_media:
            encoder.pixels(conversation, infos)
    except BadSample as problem:
        return _Rejected(line, sample_id, problem)
    return _Entry(line, size, infos)


def _check_size(size: tuple[int, int], limits: Budget) -> None:
    tokens, patches = size
    if tokens > limits.tokens:
        raise BadSample("too many tokens", f"{tokens} tokens do not fit data.seq_length {limits.tokens}")
    if patches > limits.patches:
        raise BadSample("too many patches", f"{patches} vision patches do not fit data.max_patches {limits.patches}")


def default_id(file: str, line: int) -> str:
    """Name of a row that brings no id."""
    return f"{Path(file).stem}:{line}"
