"""The simulated device with one wrong kernel, for a comparison with cpu to find."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tests.platform import simulated_musa

WRONG_WIDTH = 96
"""Matrix products that sum over so many terms are wrong."""
PIECE = 8


def install() -> None:
    """Give this process a musa device whose matrix products of one width are summed in bf16."""
    simulated_musa.install(devices=1)
    torch.musa.kernels.replace("mm", _mm)  # type: ignore[attr-defined]


def _mm(right: Callable[..., torch.Tensor], a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if a.shape[1] != WRONG_WIDTH:
        return right(a, b)
    total = torch.zeros(a.shape[0], b.shape[1], dtype=torch.bfloat16, device=a.device)
    for left, below in zip(a.split(PIECE, 1), b.split(PIECE, 0), strict=True):
        total = (total + right(left, below)).bfloat16()
    return total.to(a.dtype)
