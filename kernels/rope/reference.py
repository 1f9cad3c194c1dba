"""Rotary position embedding in plain torch: the definition, and the path on CPU."""

from __future__ import annotations

import torch


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs `(x[j], x[j + head_dim / 2])`; computed in fp32 and returned in the type of x.

    Args:
        x: `[tokens, heads, head_dim]`.
        cos, sin: fp32 `[tokens, head_dim / 2]`.
    """
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def vision_angles(positions: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of 2-D rope.

    Args:
        positions: `[patches, 2]`, row and column of each patch.

    Returns:
        fp32 `[patches, head_dim / 2]` twice: the first half of the frequencies turns by row, the second by column.
    """
    quarter = torch.arange(0, head_dim // 2, 2, dtype=torch.float32, device=positions.device)
    frequencies = 1.0 / theta ** (quarter / (head_dim // 2))
    angles = (positions.float().unsqueeze(-1) * frequencies).flatten(1)
    return angles.cos(), angles.sin()


def mrope_angles(
    positions: torch.Tensor, head_dim: int, theta: float, section: tuple[int, ...], interleaved: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of multimodal rope.

    Args:
        positions: `[3, tokens]`, time, height and width of each token.
        section: how many frequencies time, height and width get.
        interleaved: Qwen3-VL deals the frequencies out in turn (T H W T H W ... T T); Qwen2.5-VL in three chunks.

    Returns:
        fp32 `[tokens, head_dim / 2]` twice.
    """
    half = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)
    frequencies = 1.0 / theta ** (half / head_dim)
    axis = frequency_axes(section, interleaved).to(positions.device)
    angles = positions.float()[axis].T * frequencies
    return angles.cos(), angles.sin()


def frequency_axes(section: tuple[int, ...], interleaved: bool) -> torch.Tensor:
    """Which axis (0 time, 1 height, 2 width) turns each of the `sum(section)` frequencies."""
    if not interleaved:
        return torch.repeat_interleave(torch.arange(3), torch.tensor(section))
    axes = torch.zeros(sum(section), dtype=torch.long)
    for axis in (1, 2):
        axes[axis : section[axis] * 3 : 3] = axis
    return axes
