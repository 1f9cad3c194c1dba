"""Gradients between the backward pass and the optimizer: reduction, tied embeddings, scale per token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed.finalize_model_grads import _allreduce_non_tensor_model_parallel_grads

from megatron_rb.layout import Kind
from megatron_rb.models.stage import RoboBrainStage
from megatron_rb.parallel.groups import pipeline_pair_group
from megatron_rb.parallel.mesh import Mesh
from megatron_rb.parallel.session import Session


@dataclass(frozen=True)
class TiedEmbedding:
    """The two copies of a tied embedding: on the rank of the embedding block and on the rank of the head."""

    local: tuple[torch.nn.Parameter, ...]
    """The copies on this rank: none, one, or both when two chunks of one rank hold them."""
    group: dist.ProcessGroup | None
    """The two ranks, when they are two."""

    def sync_gradients(self) -> None:
        """Give both copies the sum of their gradients."""
        trained = [weight for weight in self.local if weight.requires_grad]
        if len(trained) == 2:
            total = main_grad(trained[0]) + main_grad(trained[1])
            for weight in trained:
                main_grad(weight).copy_(total)
        elif trained and self.group is not None:
            dist.all_reduce(main_grad(trained[0]), group=self.group)


def main_grad(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The gradient that megatron-core's data parallelism accumulates beside a parameter."""
    return parameter.main_grad  # type: ignore[attr-defined]


def tie_embeddings(stages: Sequence[RoboBrainStage], session: Session) -> TiedEmbedding:
    """Mark the copies of a tied embedding for megatron-core and connect them; every rank must call this.

    Nothing is to be done when the model is untied or one slice holds both blocks and thus one parameter.
    """
    layout = session.layout
    if not session.shape.text.tied_embeddings or layout.slice_of(Kind.EMBEDDING) == layout.slice_of(Kind.HEAD):
        return TiedEmbedding((), None)
    local: list[Any] = []
    for stage in stages:
        if stage.language.embedding is not None:
            local.append(stage.language.embedding.tokens.weight)
        if stage.language.head is not None:
            local.append(stage.language.head.output.weight)
            local[-1].shared = True  # counted once in the gradient norm
    for weight in local:
        # A bucket of its own: both copies are then cut the same way over the data-parallel ranks.
        weight.shared_embedding = True
    group = pipeline_pair_group(session.mesh, layout.pp_rank_of(Kind.EMBEDDING), layout.pp_rank_of(Kind.HEAD))
    return TiedEmbedding(tuple(local), group if local else None)


def gradient_finalizer(tied: TiedEmbedding, mesh: Mesh) -> Callable[..., None]:
    """The function megatron-core's schedules call after the last backward pass."""

    def finalize(
        model, num_tokens: torch.Tensor | None = None, pg_collection=None, force_all_reduce: bool = False
    ) -> None:
        for chunk in model:
            chunk.finish_grad_sync(force_all_reduce=force_all_reduce)
        _allreduce_non_tensor_model_parallel_grads(model, model[0].config, mesh.tp_group)
        tied.sync_gradients()
        if num_tokens is None:
            return
        # Labels are counted on the last stage only.
        dist.broadcast(num_tokens, src=mesh.last_pp_rank, group=mesh.pp_group)
        dist.all_reduce(num_tokens, group=mesh.dp_cp_group)
        for chunk in model:
            # A step without a single label leaves gradients of zero as they are.
            chunk.scale_gradients(1.0 / num_tokens.clamp(min=1))

    return finalize
