"""Projection to the vocabulary and cross entropy in one, chunk by chunk: no `[rows, vocabulary]` is ever in memory."""

from __future__ import annotations

import torch
from torch.torch_version import TorchVersion

from megatron_rb.kernels.dispatch import Call, check_dtype, choose
from megatron_rb.kernels.linear_cross_entropy.chunk import liger_chunk, torch_chunk
from megatron_rb.kernels.linear_cross_entropy.reference import IGNORED
from megatron_rb.kernels.linear_cross_entropy.shard import WHOLE, VocabularyShard

LOGITS_BYTES = 512 * 2**20
"""Largest fp32 logits of a chunk. Much less would cost time: every chunk reads and writes the weight's gradient."""
_CHUNKS = {"liger": liger_chunk, "torch": torch_chunk}


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    label_weights: torch.Tensor,
    shard: VocabularyShard = WHOLE,
    *,
    logits_bytes: int = LOGITS_BYTES,
    implementation: str = "auto",
) -> torch.Tensor:
    """Sum of the weighted losses of all rows, the same on every rank of the shard.

    The gradients are computed in the forward pass, so nothing of the logits is kept for the backward pass; gradients of
    gradients are not defined. The gradient of `hidden` is the part of this rank's vocabulary: the caller sums it over
    the ranks.

    Args:
        hidden: `[rows, hidden size]`; weight: `[vocabulary / ranks, hidden size]` of the same type.
        labels: int64 `[rows]`, numbers in the whole vocabulary, `IGNORED` = the row counts nothing. They are compared
            with the vocabulary only where they are on the host, for a device would have to be waited for.
        label_weights: fp32 `[rows]`, without a gradient.
        logits_bytes: largest fp32 logits that are in memory at a time.
        implementation: see `dispatch.TABLE`.

    Returns:
        fp32 scalar (fp64 for fp64).

    Raises:
        ValueError: an argument does not fit, or the implementation cannot run here.
    """
    _check(hidden, weight, labels, label_weights, shard, logits_bytes)
    name = choose("linear_cross_entropy", hidden.device, Call(hidden.dtype), implementation)
    valid = labels != IGNORED
    rows = chunk_rows(hidden.shape[0], weight.shape[0], logits_bytes)
    # Inside the function gradients are always off, and what "needs" one does so in an evaluation too.
    differentiable = torch.is_grad_enabled()
    return _LinearCrossEntropy.apply(
        hidden, weight, labels * valid, label_weights * valid, shard, rows, name, differentiable
    )


def chunk_rows(rows: int, vocabulary: int, logits_bytes: int) -> int:
    """Rows of a chunk: the fewest chunks within the limit, of equal size."""
    limit = max(1, logits_bytes // (4 * vocabulary))
    chunks = max(1, -(-rows // limit))
    return max(1, -(-rows // chunks))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, label_weights, shard, rows: int, name: str, differentiable: bool):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        label_weights = label_weights.to(wide)
        for_hidden, for_weight = (needed and differentiable for needed in ctx.needs_input_grad[:2])
        d_hidden = torch.empty_like(hidden) if for_hidden else None
        # In fp32, so that the sum over many chunks is rounded as the one product over all rows would be.
        d_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if for_weight else None
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            logits = torch.mm(hidden[part], weight.t())
            needed = for_hidden or for_weight
            chunk_loss, d_logits = _CHUNKS[name](logits, labels[part], label_weights[part], shard, needed)
            loss = loss + chunk_loss
            if d_hidden is not None and d_logits is not None:
                torch.mm(d_logits, weight, out=d_hidden[part])
            if d_weight is not None and d_logits is not None:
                _add_product(d_weight, d_logits, hidden[part])
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        d_hidden, d_weight = ctx.saved_tensors
        if d_hidden is not None:
            d_hidden = d_hidden * grad.to(d_hidden.dtype)
        if d_weight is not None:
            d_weight = torch.mul(d_weight, grad, out=torch.empty_like(d_weight, dtype=ctx.weight_dtype))
        return d_hidden, d_weight, None, None, None, None, None, None


def _add_product(total: torch.Tensor, grad: torch.Tensor, hidden: torch.Tensor) -> None:
    """`total += grad.T @ hidden`, summed in the type of the total."""
    if grad.dtype == total.dtype:
        total.addmm_(grad.t(), hidden)
    elif grad.device.type == "cuda" and TorchVersion(torch.__version__) >= "2.8":
        torch.addmm(total, grad.t(), hidden, out_dtype=total.dtype, out=total)
    else:
        total.add_(torch.mm(grad.t(), hidden))


def _check(hidden, weight, labels, label_weights, shard: VocabularyShard, logits_bytes: int) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or hidden.dtype != weight.dtype:
        raise ValueError(
            f"hidden is {hidden.dtype} {tuple(hidden.shape)} and weight {weight.dtype} {tuple(weight.shape)}; they "
            f"must be [rows, hidden size] and [vocabulary, hidden size] of one dtype"
        )
    check_dtype("hidden", hidden)
    for name, x in (("labels", labels), ("label_weights", label_weights)):
        if tuple(x.shape) != (hidden.shape[0],):
            raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be [rows] = [{hidden.shape[0]}]")
    if labels.dtype != torch.int64:
        raise ValueError(f"labels are {labels.dtype}; they must be torch.int64")
    if logits_bytes < 1:
        raise ValueError(f"logits_bytes is {logits_bytes}; it must be at least 1")
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_range(labels, weight.shape[0] * shard.size)


def _check_range(labels: torch.Tensor, vocabulary: int) -> None:
    outside = labels[((labels < 0) | (labels >= vocabulary)) & (labels != IGNORED)]
    if outside.numel():
        raise ValueError(
            f"labels has {outside[0].item()}; it must be one of 0..{vocabulary - 1}, or {IGNORED} for a row that "
            f"counts nothing"
        )
