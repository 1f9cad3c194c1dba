"""Cross entropy behind a projection to the vocabulary, with all logits in memory: the definition."""

from __future__ import annotations

import torch
import torch.nn.functional as F

IGNORED = -100
"""Label of a row that counts nothing."""


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, label_weights: torch.Tensor
) -> torch.Tensor:
    """Sum over the rows of `label_weights * -log softmax(hidden @ weight.T)[label]`, in fp32 (fp64 for fp64).

    Args:
        hidden: `[rows, hidden size]`; weight: `[vocabulary, hidden size]`.
        labels: int64 `[rows]`, `IGNORED` = the row counts nothing; label_weights: `[rows]`.
    """
    logits = F.linear(hidden, weight).to(torch.promote_types(hidden.dtype, torch.float32))
    losses = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")
    return (losses * label_weights).sum()
