"""The language model's blocks: embedding, decoder layers, head."""

from __future__ import annotations

from dataclasses import replace

import torch
from megatron.core import tensor_parallel

from megatron_rb.kernels.dynamic_padding.op import merge_rows
from megatron_rb.kernels.mrope.op import apply_mrope, qk_norm_mrope
from megatron_rb.models.language.cache import LayerCache
from megatron_rb.models.layers import (
    MLP,
    BuildContext,
    HeadNorm,
    LocalLayers,
    column_linear,
    mark_shard,
    row_linear,
)
from megatron_rb.models.robobrain.config import TextShape
from megatron_rb.models.robobrain.inputs import TextInputs
from megatron_rb.parallel.sharding import ShardSpec


class Embedding(torch.nn.Module):
    """Token embedding, vocabulary shared by the tensor-parallel ranks; visual rows replace their placeholders."""

    def __init__(self, ctx: BuildContext, shape: TextShape) -> None:
        super().__init__()
        self.sequence_parallel = ctx.sequence_parallel
        self.rows = ctx.kernels.dynamic_padding
        self.tokens = tensor_parallel.VocabParallelEmbedding(
            shape.vocab_size, shape.hidden_size, init_method=torch.nn.init.zeros_, config=ctx.config
        )
        mark_shard(self.tokens.weight, ShardSpec((shape.vocab_size, shape.hidden_size), dim=0))

    def forward(self, inputs: TextInputs, visual: torch.Tensor | None) -> torch.Tensor:
        """
        Args:
            visual: `[merged patches, 1, hidden]` as the merger gives them; None = the tokens hold no placeholders.

        Returns:
            `[tokens (/ tp), 1, hidden]`
        """
        hidden = self.tokens(inputs.input_ids.unsqueeze(0)).transpose(0, 1)
        if visual is not None:
            # With no image in the batch the map is empty; the merger then still gets a gradient, of zeros.
            hidden = merge_rows(hidden, visual, inputs.visual, self.rows)
        if self.sequence_parallel:
            hidden = tensor_parallel.scatter_to_sequence_parallel_region(hidden)
        return hidden


def _rms_norm(ctx: BuildContext, shape: TextShape, size: int) -> torch.nn.Module:
    return ctx.layers.norm(ctx, "rmsnorm", size, shape.norm_eps)


class SelfAttention(torch.nn.Module):
    """Causal grouped-query attention within samples, multimodal rope. QKV rows go group by group: its queries, k, v."""

    def __init__(self, ctx: BuildContext, shape: TextShape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        self.heads_per_group = shape.num_heads // shape.num_query_groups
        rows = (shape.num_heads + 2 * shape.num_query_groups) * shape.head_dim
        self.linear_qkv = column_linear(ctx, shape.hidden_size, rows, bias=shape.qkv_bias)
        self.linear_proj = row_linear(ctx, shape.num_heads * shape.head_dim, shape.hidden_size, bias=shape.proj_bias)
        # These names are the ones for which megatron-core sums the gradients over tensor-parallel ranks.
        self.q_layernorm = HeadNorm(ctx, shape.head_dim) if shape.qk_norm else None
        self.k_layernorm = HeadNorm(ctx, shape.head_dim) if shape.qk_norm else None
        self.norm_eps = shape.norm_eps
        self.rope = ctx.kernels.mrope
        self.core = ctx.layers.attention(ctx, shape.num_heads, shape.num_query_groups, shape.head_dim, causal=True)

    def forward(self, x: torch.Tensor, inputs: TextInputs, cache: LayerCache | None = None) -> torch.Tensor:
        qkv, _ = self.linear_qkv(x)
        tokens = qkv.shape[0]
        qkv = qkv.view(tokens, -1, self.heads_per_group + 2, self.head_dim)
        q, k, v = qkv.split([self.heads_per_group, 1, 1], dim=2)
        q, k, v = (part.reshape(tokens, -1, self.head_dim) for part in (q, k, v))
        cos, sin = inputs.rope_cos, inputs.rope_sin
        if self.q_layernorm is not None and self.k_layernorm is not None:
            weights = self.q_layernorm(), self.k_layernorm()
            q, k = qk_norm_mrope(q, k, *weights, cos, sin, self.norm_eps, implementation=self.rope)
        else:
            q, k = apply_mrope(q, k, cos, sin, implementation=self.rope)
        if cache is None:
            attended = self.core(q, k, v, inputs.samples)
        else:
            attended = cache.attend(q, k, v, inputs.samples, self.core)
        return self.linear_proj(attended.unsqueeze(1))[0]


class DecoderLayer(torch.nn.Module):
    """One pre-norm decoder layer."""

    def __init__(self, ctx: BuildContext, shape: TextShape) -> None:
        super().__init__()
        self.input_norm = _rms_norm(ctx, shape, shape.hidden_size)
        self.attention = SelfAttention(ctx, shape)
        self.post_attention_norm = _rms_norm(ctx, shape, shape.hidden_size)
        self.mlp = MLP(ctx, shape.hidden_size, shape.ffn_hidden_size, gated=True, bias=False, act="silu")

    def forward(self, x: torch.Tensor, inputs: TextInputs, cache: LayerCache | None = None) -> torch.Tensor:
        x = x + self.attention(self.input_norm(x), inputs, cache)
        return x + self.mlp(self.post_attention_norm(x))


class Head(torch.nn.Module):
    """Final norm and projection to the vocabulary, computed only for the rows that are asked for."""

    def __init__(self, ctx: BuildContext, shape: TextShape, tied_weight: torch.nn.Parameter | None) -> None:
        super().__init__()
        self.sequence_parallel = ctx.sequence_parallel
        # Under sequence parallelism the gradient of the gathered rows is summed by the gather itself, so the norm sees
        # the part of this rank's vocabulary only, and its own gradient is summed like that of the other norms.
        self.norm = _rms_norm(ctx, shape, shape.hidden_size)
        # This rule of the gradient (`disable_grad_reduce`) is a feature of megatron-core's own linear.
        plain = replace(ctx.without_sequence_parallel(), layers=LocalLayers())
        self.output = column_linear(
            plain, shape.hidden_size, shape.vocab_size, bias=False, reduce_input_grad=not ctx.sequence_parallel
        )
        if tied_weight is not None:
            self.output.weight = tied_weight

    def forward(self, x: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        """
        Args:
            x: `[tokens (/ tp), 1, hidden]`
            rows: numbers of the tokens whose logits are wanted; None = all.

        Returns:
            `[rows, vocab / tp]`
        """
        if self.sequence_parallel:
            x = tensor_parallel.gather_from_sequence_parallel_region(x)
        if rows is not None:
            x = x.index_select(0, rows)
        return self.output(self.norm(x))[0].squeeze(1)
