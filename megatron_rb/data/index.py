"""The index of a data set: where each usable row is and how large it is, found without keeping pixels."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_rb.data.encoder import SampleEncoder
from megatron_rb.data.examine import Entry, Examined, IndexRules, Refused, examine_all, lines_at, lines_of
from megatron_rb.data.fingerprint import DataFingerprint, file_digest, order_digest
from megatron_rb.data.ledger import Ledger
from megatron_rb.data.media import MediaInfo
from megatron_rb.data.problems import NoUsableSample


@dataclass(frozen=True)
class Index:
    """One entry per sample, a usable row or one turn of it, as arrays so that millions stay small and can be kept."""

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
    turns: np.ndarray
    """int64 `[rows]`: the assistant turn that a sample is cut at, or -1 for whole rows."""
    digests: tuple[str, ...]
    """Of the content of each file."""
    refused: np.ndarray
    """int64 `[refused, 4]`: places of the rows that may be usable with other media."""
    refused_problems: tuple[str, ...]
    unread: dict[str, int]
    """Keys that mean nothing here, with the number of rows that have them."""

    def __len__(self) -> int:
        return len(self.places)

    @property
    def fingerprint(self) -> DataFingerprint:
        return DataFingerprint(self.files, self.digests, len(self), order_digest(self.places, self.turns))

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
                file,
                files=np.array(self.files),
                places=self.places,
                sizes=self.sizes,
                media_starts=self.media_starts,
                media=self.media,
                stamp_starts=self.stamp_starts,
                stamps=self.stamps,
                rejected=np.array(json.dumps(self.rejected)),
                turns=self.turns,
                digests=np.array(self.digests),
                refused=self.refused,
                refused_problems=np.array(self.refused_problems),
                unread=np.array(json.dumps(self.unread)),
            )
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
            turns=arrays["turns"],
            digests=tuple(map(str, arrays["digests"])),
            refused=arrays["refused"],
            refused_problems=tuple(map(str, arrays["refused_problems"])),
            unread=json.loads(str(arrays["unread"])),
        )


def build_index(
    files: Sequence[str], encoder: SampleEncoder, rules: IndexRules, ledger: Ledger, *, threads: int, progress: bool
) -> Index:
    """Look at every row once; each row that cannot be used becomes a line of the ledger.

    Args:
        threads: rows that are looked at together.
        progress: show a progress bar.

    Raises:
        ValueError: a file is missing or is no jsonl file.
        NoUsableSample: no row of all the files is usable.
    """
    for file in files:
        _check_file(file)
    digests = tuple(map(file_digest, files))
    found = _RowCollector(files)
    for row in examine_all(lines_of(files), files, encoder, rules, threads, progress):
        found.add(row, ledger)
    if not found.entries:
        raise NoUsableSample(
            f"no usable sample in {', '.join(files) or 'an empty list of files'} ({describe(found.rejected)}); "
            f"{found.first}; see {ledger.path}"
        )
    return found.index(digests)


def look_again(index: Index, encoder: SampleEncoder, rules: IndexRules, ledger: Ledger, *, threads: int) -> Index:
    """The index with those rows that were refused for their media and are usable now, in the order of the files."""
    places = index.refused.tolist()
    lines = lines_at(places, index.files)
    rows = list(examine_all(lines, index.files, encoder, rules, threads, progress=False))
    repaired = [row for row in rows if any(isinstance(item, Entry) for item in row.found)]
    if not repaired:
        return index
    problems = dict(zip(map(tuple, places), index.refused_problems, strict=True))
    found = _RowCollector(index.files, index)
    for row in repaired:
        found.rejected[problems[row.line.place]] -= 1
        del found.refused[row.line.place]
        ledger.record(
            "accepted",
            index.files[row.line.file],
            "its media can be read now",
            line=row.line.number,
        )
        found.add(row, ledger)
    found.entries.sort(key=lambda entry: (entry[0][:2], entry[1].turn))
    return found.index(index.digests)


def _check_file(file: str) -> None:
    if not Path(file).is_file():
        raise ValueError(f"no data file {file}; data.train and data.evaluation name jsonl files")
    with open(file, "rb") as opened:
        start = opened.read(4096).lstrip()
    if re.match(rb"\[\s*(\{|$|[\r\n])", start):
        raise ValueError(
            f"{file} is one JSON array, not a jsonl file with a row in each line; "
            f"write it as one, e.g. jq -c '.[]' {file} > {Path(file).with_suffix('.jsonl')}"
        )


Place = tuple[int, int, int, int]


class _RowCollector:
    """What the rows of some files gave, before it becomes arrays."""

    def __init__(self, files: Sequence[str], known: Index | None = None) -> None:
        self.files = files
        self.entries: list[tuple[Place, Entry]] = list(_entries(known)) if known else []
        self.rejected: Counter[str] = Counter(known.rejected if known else {})
        self.unread: Counter[str] = Counter(known.unread if known else {})
        self.refused: dict[Place, str] = {}
        self.first = "they hold no rows"
        if known:
            self.refused = dict(zip(map(_place, known.refused.tolist()), known.refused_problems, strict=True))

    def add(self, row: Examined, ledger: Ledger) -> None:
        self.unread.update(row.unread)
        for item in row.found:
            if isinstance(item, Entry):
                self.entries.append((row.line.place, item))
            else:
                self._refuse(row, item, ledger)

    def index(self, digests: tuple[str, ...]) -> Index:
        entries = [entry for _, entry in self.entries]
        media = [info for entry in entries for info in entry.media]
        sizes = [(info.height, info.width, info.frames, info.fps, info.given_frames) for info in media]
        return Index(
            files=tuple(self.files),
            places=np.array([place for place, _ in self.entries], dtype=np.int64),
            turns=np.array([entry.turn for entry in entries], dtype=np.int64),
            sizes=np.array([entry.size for entry in entries], dtype=np.int64),
            media_starts=np.cumsum([0] + [len(entry.media) for entry in entries]).astype(np.int64),
            media=np.array(sizes, dtype=np.float64).reshape(-1, 5),
            stamp_starts=np.cumsum([0] + [len(info.stamps) for info in media]).astype(np.int64),
            stamps=np.array([second for info in media for second in info.stamps], dtype=np.float64),
            rejected={problem: count for problem, count in self.rejected.items() if count},
            digests=digests,
            refused=np.array(list(self.refused), dtype=np.int64).reshape(-1, 4),
            refused_problems=tuple(self.refused.values()),
            unread=dict(self.unread),
        )

    def _refuse(self, row: Examined, item: Refused, ledger: Ledger) -> None:
        file, problem = self.files[row.line.file], item.problem
        if not self.rejected:
            self.first = f"the first, {file} line {row.line.number}: {problem}"
        self.rejected[problem.problem] += 1
        if item.by_media:
            self.refused[row.line.place] = problem.problem
        ledger.record("rejected", file, str(problem), line=row.line.number, id=item.sample_id, problem=problem.problem)


def _entries(index: Index) -> Iterator[tuple[Place, Entry]]:
    for row in range(len(index)):
        tokens, patches = index.sizes[row].tolist()
        yield _place(index.places[row]), Entry(int(index.turns[row]), (tokens, patches), index.media_infos(row))


def _place(row: Iterable[int]) -> Place:
    file, number, offset, length = map(int, row)
    return file, number, offset, length


def describe(rejected: dict[str, int]) -> str:
    """Counts of refused rows in words."""
    parts = [f"{count} {problem}" for problem, count in sorted(rejected.items(), key=lambda item: -item[1])]
    return f"{sum(rejected.values())} rows refused: {', '.join(parts)}" if parts else "no rows refused"
