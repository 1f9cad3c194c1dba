"""What megatron-core clips gradients with where neither Transformer Engine nor Apex is: without a read of the device.

megatron-core's own replacements read the norm of every tensor on the host and keep a copy of every gradient they scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

TensorLists = Sequence[Sequence[torch.Tensor]]


def l2_norm(
    chunk_size: int, noop_flag: Any, tensor_lists: TensorLists, per_tensor: bool, *_: Any
) -> tuple[torch.Tensor, None]:
    """The norm of all tensors together, fp32 `[1]` on their device; called as `amp_C.multi_tensor_l2norm` is."""
    norms = torch._foreach_norm([tensor for tensors in tensor_lists for tensor in tensors])
    return torch.linalg.vector_norm(torch.stack(norms)).float().reshape(1), None


def scale(chunk_size: int, noop_flag: Any, tensor_lists: TensorLists, factor: float) -> None:
    """Scale the tensors of the first list into those of the second; called as `amp_C.multi_tensor_scale` is."""
    for source, target in zip(*tensor_lists, strict=True):
        if source is target:
            target.mul_(factor)
        else:
            torch.mul(source, factor, out=target)
