"""The part of the vocabulary that a rank holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class VocabularyShard:
    """Equal, consecutive parts of the vocabulary on the ranks of a group; what is summed over them."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    """None where one rank holds all of the vocabulary."""

    def maximum(self, x: torch.Tensor) -> torch.Tensor:
        """The largest of every rank's values, in place."""
        if self.size > 1:
            dist.all_reduce(x, op=dist.ReduceOp.MAX, group=self.group)
        return x

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's values, in place."""
        if self.size > 1:
            dist.all_reduce(x, group=self.group)
        return x


WHOLE = VocabularyShard()
