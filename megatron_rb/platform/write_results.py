"""What the writers of a checkpoint have to report, on its way from a forked process to the one that forked it."""

from __future__ import annotations

import os
import pickle
import queue
import tempfile
from functools import cache
from typing import Any, BinaryIO, cast

LENGTH_BYTES = 8


class WriteResults:
    """The part of `queue.Queue` that megatron-core's writers use, in a file without a name that forks share.

    megatron-core's own queue lives in a server, a new interpreter that every rank starts at its first save: it imports
    torch while the training waits, and keeps its memory to the end. A pipe would not do: the parent waits for the
    writer's end before it reads, and what a pipe cannot hold its writer waits for.
    """

    def __init__(self) -> None:
        self._file = _file_without_name()
        self._position = 0
        """Of the next value to read; only the process that reads moves it."""

    def put(self, value: Any) -> None:
        data = pickle.dumps(value)
        left = memoryview(len(data).to_bytes(LENGTH_BYTES, "little") + data)
        position = self._size()
        while left:
            written = os.pwrite(self._file.fileno(), left, position)
            left, position = left[written:], position + written

    def get_nowait(self) -> Any:
        """Raises queue.Empty where nothing is left."""
        if self._position == self._size():
            raise queue.Empty
        start = self._position + LENGTH_BYTES
        self._position = start + int.from_bytes(self._read(LENGTH_BYTES, self._position), "little")
        value = pickle.loads(self._read(self._position - start, start))
        if self._position == self._size():
            self._position = self._file.truncate(0)
        return value

    def _read(self, count: int, position: int) -> bytes:
        return os.pread(self._file.fileno(), count, position)

    def _size(self) -> int:
        return os.fstat(self._file.fileno()).st_size


def _file_without_name() -> BinaryIO:
    """In memory where the system has such files."""
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create("write-results"), "r+b", buffering=0)
    return cast(BinaryIO, tempfile.TemporaryFile(buffering=0))


@cache
def _of_this_process() -> WriteResults:
    return WriteResults()


def write_results(mp_mode: str = "") -> WriteResults:
    """Those of this process and its forks, as megatron-core asks for its queue, whatever mode it starts in."""
    return _of_this_process()
