"""Why a row cannot be trained on."""

from __future__ import annotations


class BadSample(ValueError):
    """A row or its media that cannot be used; the message is one sentence for the ledger."""

    def __init__(self, problem: str, message: str) -> None:
        super().__init__(message)
        self.problem = problem
        """A few words that rows with the same fault share, for counting."""


class NoUsableSample(ValueError):
    """Every row of some data files was refused."""
