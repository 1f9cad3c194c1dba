"""What is asked: rows, their pictures, and the file that the answers go to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Questions:
    """Questions whose answers are written as they come, so that a stopped run goes on where it was."""

    rows: Sequence[dict]
    """Each with `id`, `image` and one human turn."""
    media_root: Path
    """Where relative paths of pictures start."""
    out: Path
    """jsonl of `question_id` and `answer`; those that it holds already are not asked again."""

    @property
    def ledger(self) -> Path:
        """Gets a line for every question that cannot be asked."""
        return self.out.with_suffix(".ledger.jsonl")
