"""The gated activation of the MLPs spelled out: the definition."""

from __future__ import annotations

import torch


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up` of `[..., 2 * ffn size]`, gate first."""
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up
