"""Which token follows: the likeliest, or one drawn with temperature, top-k and top-p, the same on any layout."""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from megatron_rb.generation.spec import Sampling


def draws_of(seed: int, sample_id: str) -> np.random.Generator:
    """One number in [0, 1) per generated token of a sample, from (seed, sample id) alone."""
    words = np.frombuffer(hashlib.sha256(f"{sample_id}\0answer".encode()).digest(), dtype="<u4")
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, *words.tolist()])))


def choose_tokens(logits: torch.Tensor, sampling: Sampling, draws: torch.Tensor) -> torch.Tensor:
    """
    Args:
        logits: `[sequences, vocab]`.
        draws: fp32 `[sequences]` in [0, 1), not read when greedy.

    Returns:
        int64 `[sequences]`
    """
    if sampling.greedy:
        return logits.argmax(dim=-1)
    tokens, probabilities = kept_tokens(logits, sampling)
    cumulative = probabilities.cumsum(dim=-1)
    wanted = draws.to(cumulative)[:, None] * cumulative[:, -1:]
    place = (cumulative <= wanted).sum(dim=-1, keepdim=True)
    # Rounding may carry a draw close to 1 behind the last token that may be drawn.
    place = torch.minimum(place, (probabilities > 0).sum(dim=-1, keepdim=True) - 1)
    return tokens.gather(-1, place).squeeze(-1)


def kept_tokens(logits: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, likeliest first, and their probabilities, both `[sequences, vocab]`; 0 = may not be drawn."""
    ordered = (logits.float() / sampling.temperature).sort(dim=-1, descending=True, stable=True)
    scores = ordered.values
    if sampling.top_k:
        scores = scores.clone()
        scores[:, sampling.top_k :] = float("-inf")
    probabilities = scores.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    # The likeliest token stays in any case.
    before[:, 0] = 0.0
    probabilities = probabilities.masked_fill(before >= sampling.top_p, 0.0)
    return ordered.indices, probabilities / probabilities.sum(dim=-1, keepdim=True)
