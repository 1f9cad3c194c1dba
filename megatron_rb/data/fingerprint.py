"""What tells data apart, whatever the names, sizes and times of their files say."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

CHUNK = 1 << 22


@dataclass(frozen=True)
class DataFingerprint:
    """Which samples a data set holds, and in which order."""

    files: tuple[str, ...]
    contents: tuple[str, ...]
    """For each file the digest of its bytes."""
    samples: int
    order: str
    """Digest of file, line and turn of every sample in order."""

    def as_state(self) -> dict[str, Any]:
        """For a checkpoint; `of_state` reads it."""
        return asdict(self)

    def change_since(self, before: DataFingerprint) -> str:
        """What has changed in words; empty when both give the same samples in the same order."""
        if self.contents != before.contents:
            return _changed_files(before, self)
        if self.order != before.order:
            counts = f"the same data files gave {before.samples} samples and give {self.samples} now"
            return f"{counts}, as other rows are refused (by their media, data.seq_length or the tokenizer)"
        return ""


def of_state(state: Mapping[str, Any]) -> DataFingerprint:
    """What `as_state` wrote."""
    return DataFingerprint(tuple(state["files"]), tuple(state["contents"]), int(state["samples"]), str(state["order"]))


def file_digest(path: str | Path) -> str:
    """Digest of a file's bytes."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while part := file.read(CHUNK):
            digest.update(part)
    return digest.hexdigest()


def order_digest(places: np.ndarray, turns: np.ndarray) -> str:
    """Digest of a list of samples.

    Args:
        places: int64 `[samples, 4]`, of which file and line number count.
        turns: int64 `[samples]`.
    """
    rows = np.column_stack([places[:, :2], turns]).astype("<i8")
    return hashlib.blake2b(np.ascontiguousarray(rows).tobytes(), digest_size=16).hexdigest()


def _changed_files(before: DataFingerprint, now: DataFingerprint) -> str:
    if len(before.contents) != len(now.contents):
        return f"there were {len(before.contents)} data files, and are {len(now.contents)}"
    pairs: Sequence[tuple[str, str, str]] = list(zip(now.files, before.contents, now.contents, strict=True))
    changed = [f"{name} (its content was {then[:8]} and is {here[:8]})" for name, then, here in pairs if then != here]
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    return f"changed {'is' if len(changed) == 1 else 'are'} {', '.join(changed[:3])}{more}"
