"""The folder a conversion writes into until it is complete: kept when it is stopped, renamed when it is done."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_rb.checkpoint.conversion.stream import Job
from megatron_rb.config.locks import lock_exclusively

SUFFIX = ".partial"
JOURNAL = "journal.jsonl"
THREADS = 4
"""Files in flight: enough to keep a disk busy, few enough to stay within a small, fixed amount of memory."""
SPARE = 64 << 20
"""Bytes that must be free beyond those to be written."""

FileRecord = dict[str, Any]


class Workspace:
    """`OUT.partial` and its journal.

    Args:
        out: the folder that appears when all is done.
        identity: what is converted and how, JSON-able; a stopped conversion goes on only under the same one.

    Raises:
        ValueError: `out` is taken, another process converts into it, or a stopped conversion was another one.
    """

    def __init__(self, out: str | Path, identity: Mapping[str, Any]) -> None:
        self.final = Path(out).resolve()
        self.folder = self.final.with_name(self.final.name + SUFFIX)
        self.identity = json.loads(json.dumps(identity))
        self.finished: dict[str, FileRecord] = {}
        if self.final.exists() and (not self.final.is_dir() or any(self.final.iterdir())):
            raise ValueError(f"{out} exists already; choose another folder for --out, or delete it")

    @contextmanager
    def opened(self, num_bytes: int) -> Iterator[Workspace]:
        """Hold the folder; `num_bytes` is the size of all files to be written."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / JOURNAL, "a+") as journal:
            try:
                lock_exclusively(journal, self.folder)
            except BlockingIOError:
                raise ValueError(f"another process is converting into {self.folder}; wait for it to end") from None
            self.journal = journal
            self._read_journal()
            self._check_space(num_bytes)
            try:
                yield self
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise ValueError(
                    f"the disk of {self.folder} is full; free some space and run the same command again: "
                    f"{len(self.finished)} finished files are kept there, nothing was published"
                ) from error

    def _read_journal(self) -> None:
        self.journal.seek(0)
        lines = [line for line in self.journal.read().split("\n")[:-1] if line]
        entries = [json.loads(line) for line in lines]
        if not entries:
            self._append({"identity": self.identity})
            return
        if entries[0].get("identity") != self.identity:
            raise ValueError(
                f"{self.folder} holds the beginning of another conversion ({_difference(entries[0], self.identity)}); "
                "delete it, or choose another folder for --out"
            )
        for record in entries[1:]:
            path = self.folder / record["file"]
            if path.is_file() and path.stat().st_size == record["bytes"]:
                self.finished[record["file"]] = record

    def _check_space(self, num_bytes: int) -> None:
        needed = num_bytes - sum(record["bytes"] for record in self.finished.values()) + SPARE
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            if not self.finished:
                shutil.rmtree(self.folder)
            raise ValueError(
                f"{self.final.parent} has {free / 1e9:.2f} GB free, {needed / 1e9:.2f} GB are needed; free some space "
                "or choose another folder for --out"
            )

    def _append(self, entry: Mapping[str, Any]) -> None:
        self.journal.write(json.dumps(entry) + "\n")
        self.journal.flush()
        os.fsync(self.journal.fileno())

    def write_files(self, writers: Mapping[str, Callable[[Path], FileRecord]], job: Job) -> dict[str, FileRecord]:
        """Write the files that are not finished yet, several at a time; returns the records of all, in order."""
        todo = [name for name in writers if name not in self.finished]

        def write(name: str) -> FileRecord:
            record = {"file": name, **writers[name](self.folder / name)}
            _flush(self.folder / name)  # now, while other files are being written
            return record | {"bytes": (self.folder / name).stat().st_size}

        for record in in_parallel([lambda name=name: write(name) for name in todo], job):  # type: ignore[misc]
            self._append(record)
            self.finished[record["file"]] = record
        return {name: self.finished[name] for name in writers}

    @contextmanager
    def discarded_when_wrong(self) -> Iterator[None]:
        """What was read back wrong must not count as finished the next time."""
        try:
            yield
        except ValueError:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise

    def publish(self) -> None:
        """Flush everything to the disk and give the folder its name."""
        for path in sorted(self.folder.rglob("*")):
            if path.name not in self.finished:
                _flush(path)
        (self.folder / JOURNAL).unlink()
        if self.final.is_dir():
            self.final.rmdir()  # an empty folder the user made
        self.folder.rename(self.final)
        _flush(self.final.parent)


def _flush(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def in_parallel(actions: list[Callable[[], Any]], job: Job) -> Iterator[Any]:
    """Results of actions as they are done, in several threads; the first failure or an interruption stops all."""
    with ThreadPoolExecutor(THREADS) as threads:
        futures = [threads.submit(action) for action in actions]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            job.stop.set()  # those that run notice it at their next block
            for future in futures:
                future.cancel()
            raise


def _difference(entry: Mapping[str, Any], identity: Mapping[str, Any]) -> str:
    theirs = entry.get("identity", {})
    for key in identity:
        if theirs.get(key) != identity[key]:
            return f"its {key} was {theirs.get(key)!r}, now it is {identity[key]!r}"
    return "its options were others"
