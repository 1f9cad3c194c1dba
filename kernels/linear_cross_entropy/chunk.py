"""Losses of one chunk of rows and their gradient in place of the logits: in torch, and with Liger's operator."""

from __future__ import annotations

import torch

from megatron_rb.kernels.linear_cross_entropy.reference import IGNORED
from megatron_rb.kernels.linear_cross_entropy.shard import VocabularyShard


def torch_chunk(
    logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, shard: VocabularyShard, gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Sum of the weighted losses, and its gradient with respect to the logits.

    Two reductions over the ranks (the largest logit; the sum of exponentials together with the label's logit) and one
    buffer of fp32, which is the logits themselves where they are fp32: they are overwritten.

    Args:
        logits: `[rows, vocabulary / ranks]`; labels: `[rows]`, all valid; weights: fp32 `[rows]`.
    """
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    width = x.shape[1]
    local = labels - shard.rank * width
    mine = (local >= 0) & (local < width)
    place = local.clamp(0, width - 1).unsqueeze(1)
    x.sub_(shard.maximum(x.amax(1)).unsqueeze(1))
    of_label = x.gather(1, place).squeeze(1) * mine
    x.exp_()
    total, of_label = shard.sum(torch.stack((x.sum(1), of_label))).unbind(0)
    loss = ((total.log() - of_label) * weights).sum()
    if not gradient:
        return loss, None
    x.mul_((weights / total).unsqueeze(1))
    x.scatter_add_(1, place, -(weights * mine).to(x.dtype).unsqueeze(1))
    return loss, x.to(logits.dtype)


def liger_chunk(
    logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, shard: VocabularyShard, gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `torch_chunk`, by Liger-Kernel's cross entropy over a shared vocabulary: two passes over the logits.

    Not its fused linear cross entropy: that asks the device for the number of labels, and takes weights of rows only
    with a second projection to the vocabulary.
    """
    from liger_kernel.ops import LigerVocabParallelCEFunction  # optional

    with torch.enable_grad():
        leaf = logits.detach().unsqueeze(1).requires_grad_(gradient)
        losses = LigerVocabParallelCEFunction.apply(
            leaf, labels.unsqueeze(1), shard.group, IGNORED, 0.0, "megatron", "global"
        ).squeeze(1)
        loss = (losses * weights).sum()
        grad = torch.autograd.grad(loss, leaf)[0].squeeze(1) if gradient else None
    return loss.detach(), grad
