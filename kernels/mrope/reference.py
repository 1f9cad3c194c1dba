"""Multimodal rotary position embedding, with and without QK-norm, in plain torch: the definition."""

from __future__ import annotations

import torch


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs `(x[j], x[j + head_dim / 2])`; computed in fp32 (fp64 for fp64) and returned in the type of x.

    Args:
        x: `[tokens, heads, head_dim]`.
        cos, sin: `[tokens, head_dim / 2]`.
    """
    first, second = x.to(_wide(x)).chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def apply_rope_like_hf(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """As `apply_rope`, every operation rounded to the type of x: what transformers computes in its text layers."""
    cos, sin = (torch.cat((part, part), dim=-1).unsqueeze(1).to(x.dtype) for part in (cos, sin))
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root-mean-square norm over the last dimension, in fp32 (fp64 for fp64) and not rounded back."""
    wide = x.to(_wide(x))
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight


def rms_norm_like_hf(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As `rms_norm`, rounded to the type of x before the weight and after it: what transformers computes."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def qk_norm_rope(
    x: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float
) -> torch.Tensor:
    """`rms_norm` over each head, then `apply_rope`, rounded once.

    Args:
        x: `[tokens, heads, head_dim]`.
        weight: `[head_dim]`.
        cos, sin: `[tokens, head_dim / 2]`.
    """
    return apply_rope(rms_norm(x, weight, eps), cos, sin).to(x.dtype)


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


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
    axis = frequency_axes(section, interleaved, positions.device)
    angles = positions.float()[axis].T.contiguous() * frequencies
    return angles.cos(), angles.sin()


def frequency_axes(section: tuple[int, ...], interleaved: bool, device: torch.device | str = "cpu") -> torch.Tensor:
    """Which axis (0 time, 1 height, 2 width) turns each of the `sum(section)` frequencies.

    Filled in on the device: a list that is brought there would make the host wait.
    """
    axes = torch.zeros(sum(section), dtype=torch.long, device=device)
    for axis in (1, 2):
        start = sum(section[:axis])
        axes[slice(axis, section[axis] * 3, 3) if interleaved else slice(start, start + section[axis])] = axis
    return axes
