"""Low-rank factors beside a linear whose outputs or inputs tensor-parallel ranks share.

The factor that meets the whole of the other side is held by every rank, the other one is cut as the linear is: what
travels between ranks are the `rank` columns between the two factors, and any rank fits any degree.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_rb.models.adapters.plan import Adapter, adapted
from megatron_rb.models.layers import mark_shard
from megatron_rb.parallel.sharding import ShardSpec
from megatron_rb.shapes.linears import HFModule, LinearCut, ModelLinear, RowOrder


class LowRank(torch.nn.Module):
    """The two factors of one module of transformers."""

    def __init__(self, rank: int, inputs: int, outputs: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.lora_A = torch.nn.Parameter(torch.empty(rank, inputs, dtype=dtype))
        self.lora_B = torch.nn.Parameter(torch.empty(outputs, rank, dtype=dtype))

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Both; called like a module, so that data parallelism's hooks gather them before they are read."""
        return self.lora_A, self.lora_B


class LoraUpdate(torch.nn.Module):
    """What one adapter adds to the output of one linear.

    Args:
        groups: query groups of the attention layers of the language model, over all tensor-parallel ranks.
        sequence_parallel: each rank has its own rows of the input of a linear that is cut by outputs, and gives its own
            rows of the output of one that is cut by inputs.
    """

    def __init__(
        self,
        adapter: Adapter,
        linear: ModelLinear,
        groups: int,
        tp_size: int,
        sequence_parallel: bool,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.scale, self.dropout = adapter.scale, adapter.dropout
        self.linear, self.chosen = linear, adapted(adapter, linear)
        self.groups = groups // tp_size
        self.sequence_parallel = sequence_parallel
        self.widths = [_outputs(linear, module).local_shape(tp_size)[0] for module in linear.modules]
        for number in self.chosen:
            module = linear.modules[number]
            factors = _low_rank(adapter.rank, linear, module, tp_size, dtype)
            self.add_module(module.name.rpartition(".")[2], factors)
            if sequence_parallel:
                # Each rank sees its rows of the tokens only: the gradients of all ranks are summed.
                whole = factors.lora_A if linear.cut is LinearCut.OUTPUTS else factors.lora_B
                whole.sequence_parallel = True  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: `[rows, 1, inputs]` as the linear takes it: its rows (sequence parallelism), its columns (cut by inputs).

        Returns:
            `[rows, 1, outputs]` as the linear gives it.
        """
        factors = [cast(LowRank, module)() for module in self.children()]
        inner = torch.cat([F.linear(self._dropped(x), a) for a, _ in factors], -1)
        inner = self._exchanged(inner) * self.scale
        updates = [F.linear(part, b) for part, (_, b) in zip(inner.chunk(len(factors), -1), factors, strict=True)]
        return self._in_order(dict(zip(self.chosen, updates, strict=True)))

    def _dropped(self, x: torch.Tensor) -> torch.Tensor:
        if not (self.dropout and self.training):
            return x
        with self._generator():
            return F.dropout(x, self.dropout)

    def _generator(self) -> AbstractContextManager[None]:
        """Ranks that hold the same values draw the same; those with other rows or columns have numbers of their own."""
        different = self.sequence_parallel or self.linear.cut is LinearCut.INPUTS
        return get_cuda_rng_tracker().fork() if different else nullcontext()

    def _exchanged(self, inner: torch.Tensor) -> torch.Tensor:
        """The product with the first factors, from the rows or columns of this rank to what the second ones need."""
        if self.linear.cut is LinearCut.OUTPUTS:
            if self.sequence_parallel:
                return tensor_parallel.gather_from_sequence_parallel_region(inner)
            return tensor_parallel.copy_to_tensor_model_parallel_region(inner)
        if self.sequence_parallel:
            return tensor_parallel.reduce_scatter_to_sequence_parallel_region(inner)
        return tensor_parallel.reduce_from_tensor_model_parallel_region(inner)

    def _in_order(self, updates: dict[int, torch.Tensor]) -> torch.Tensor:
        """Columns of the updates of all modules as the rows of the linear's weight lie; zeros for the others."""
        if len(self.linear.modules) == 1:
            return updates[0]
        some = next(iter(updates.values()))
        parts = [
            updates[number] if number in updates else some.new_zeros(*some.shape[:-1], width)
            for number, width in enumerate(self.widths)
        ]
        if self.linear.order is RowOrder.STACKED:
            return torch.cat(parts, -1)
        return torch.cat([part.unflatten(-1, (self.groups, -1)) for part in parts], -1).flatten(-2)


def _low_rank(rank: int, linear: ModelLinear, module: HFModule, tp_size: int, dtype: torch.dtype) -> LowRank:
    by_outputs = linear.cut is LinearCut.OUTPUTS
    first = ShardSpec((rank, linear.inputs), None if by_outputs else 1)
    second = _outputs(linear, module, rank) if by_outputs else ShardSpec((module.outputs, rank))
    factors = LowRank(rank, first.local_shape(tp_size)[1], second.local_shape(tp_size)[0], dtype)
    mark_shard(factors.lora_A, first)
    mark_shard(factors.lora_B, second)
    return factors


def _outputs(linear: ModelLinear, module: HFModule, *tail: int) -> ShardSpec:
    """How the rows of one module are shared in a linear that is cut by outputs."""
    return ShardSpec((module.outputs, *tail), 0 if linear.cut is LinearCut.OUTPUTS else None)


class LoraUpdates(torch.nn.ModuleDict):
    """What all adapters add to the output of one linear, by their names."""

    def forward(self, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        for update in self.values():
            output = output + update(x)
        return output


def add_updates(linear: torch.nn.Module, updates: LoraUpdates) -> None:
    """Let a linear of megatron-core or Transformer Engine return its output with the updates."""
    linear.add_module("adapters", updates)
    linear.register_forward_hook(_updated)


def _updated(linear: torch.nn.Module, inputs: Sequence[torch.Tensor], output: tuple) -> tuple:
    updates = cast(LoraUpdates, linear.adapters)
    return updates(inputs[0], output[0]), *output[1:]
