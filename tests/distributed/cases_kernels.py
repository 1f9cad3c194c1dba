"""Cases for test_linear_cross_entropy: the loss over a vocabulary that two ranks share."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron_rb.kernels.linear_cross_entropy.op import linear_cross_entropy
from megatron_rb.kernels.linear_cross_entropy.shard import WHOLE, VocabularyShard

ROWS, HIDDEN, VOCABULARY = 11, 8, 32


def shared_vocabulary() -> list[dict[str, Any]]:
    """For each chunk size the differences between both ranks together and one rank alone."""
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, HIDDEN, generator=draw).requires_grad_()
    weight = torch.randn(VOCABULARY, HIDDEN, generator=draw).requires_grad_()
    labels, weights = torch.arange(ROWS) * 3 % VOCABULARY, torch.rand(ROWS, generator=draw)
    labels[4] = -100
    whole = linear_cross_entropy(hidden, weight, labels, weights, WHOLE)
    truth = torch.autograd.grad(whole, (hidden, weight))
    mine = weight.detach().chunk(size)[rank].clone().requires_grad_()
    results = []
    for rows in (ROWS, 3, 1):
        shard = VocabularyShard(rank, size, dist.group.WORLD)
        loss = linear_cross_entropy(hidden, mine, labels, weights, shard, logits_bytes=4 * rows * len(mine))
        d_hidden, d_weight = torch.autograd.grad(loss, (hidden, mine))
        dist.all_reduce(d_hidden)
        results.append(
            {
                "rows": rows,
                "loss": abs(loss.item() - whole.item()),
                "d_hidden": (d_hidden - truth[0]).abs().max().item(),
                "d_weight": (d_weight - truth[1].chunk(size)[rank]).abs().max().item(),
            }
        )
    return results
