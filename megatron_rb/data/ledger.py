"""The ledger: one line of JSON for every sample that was refused or repaired."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from types import TracebackType

from megatron_rb.data.problems import shortened


class Ledger:
    """Append-only `ledger.jsonl` of a run; every rank may hold one on the same file.

    Each record is written with a single system call in append mode, so that lines of several ranks do not mix.
    """

    def __init__(self, path: str | Path, rank: int = 0) -> None:
        self.path = Path(path)
        self.rank = rank
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def record(self, kind: str, source: str, reason: str, **fields: object) -> None:
        """Write one line.

        Args:
            kind: what happened, e.g. `rejected` or `unreadable`.
            source: where the sample comes from, e.g. a file.
            reason: one sentence.
            fields: anything else that JSON can hold; of long texts begin and end are kept.
        """
        kept = {name: shortened(value) if isinstance(value, str) else value for name, value in fields.items()}
        entry = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
            "rank": self.rank,
            "kind": kind,
            "source": source,
            "reason": shortened(reason),
            **kept,
        }
        os.write(self._file, (json.dumps(entry, ensure_ascii=False) + "\n").encode(errors="replace"))

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_ledger(path: str | Path) -> list[dict[str, object]]:
    """All records of a ledger in the order in which they were written; none when there is no file."""
    path = Path(path)
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
