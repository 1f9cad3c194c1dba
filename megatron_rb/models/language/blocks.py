"""The language model's blocks: embedding, decoder layers, head."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from typing import Any

import torch
from megatron.core import tensor_parallel

from megatron_rb.kernels.dynamic_padding.op import merge_rows
from megatron_rb.kernels.linear_cross_entropy.op import linear_cross_entropy
from megatron_rb.kernels.linear_cross_entropy.shard import VocabularyShard
from megatron_rb.kernels.mrope.op import apply_mrope, qk_norm_mrope
from megatron_rb.models.inputs import TextInputs
from megatron_rb.models.language.cache import LayerCache
from megatron_rb.models.layers import (
    MLP,
    BuildContext,
    ColumnLinear,
    HeadNorm,
    LocalLayers,
    column_linear,
    mark_shard,
    row_linear,
)
from megatron_rb.parallel import context
from megatron_rb.parallel.sharding import ShardSpec
from megatron_rb.shapes.towers import TextShape


class Embedding(torch.nn.Module):
    """Token embedding, vocabulary shared by the tensor-parallel ranks; visual rows replace their placeholders."""

    def __init__(self, ctx: BuildContext, shape: TextShape) -> None:
        super().__init__()
        self.sequence_parallel = ctx.sequence_parallel
        self.rows = ctx.kernels.dynamic_padding
        self.mesh = ctx.mesh
        self.tokens = tensor_parallel.VocabParallelEmbedding(
            shape.vocab_size, shape.hidden_size, init_method=torch.nn.init.zeros_, config=ctx.config
        )
        mark_shard(self.tokens.weight, ShardSpec((shape.vocab_size, shape.hidden_size), dim=0))

    def forward(self, inputs: TextInputs, visual: torch.Tensor | None) -> torch.Tensor:
        """
        Args:
            visual: `[merged patches, 1, hidden]` as the merger of this rank gives them; None = the tokens hold no
                placeholders.

        Returns:
            `[tokens (/ tp), 1, hidden]`
        """
        hidden = self.tokens(inputs.input_ids.unsqueeze(0)).transpose(0, 1)
        if visual is not None:
            if inputs.keys is not None:
                visual = context.gather_rows(visual, self.mesh.cp_group)
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
        self.mesh = ctx.mesh
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
        if inputs.keys is not None:
            k, v = context.gather_keys(k, v, inputs.keys.ranges, self.mesh.cp_group)
            attended = self.core(q, k, v, inputs.samples, inputs.keys.segments)
        elif cache is None:
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


class VocabularyLinear(ColumnLinear):
    """The projection to the vocabulary, which gives logits, or in one go the loss of rows whose labels are known."""

    def __init__(self, input_size: int, output_size: int, *, implementation: str, **options: Any) -> None:
        super().__init__(input_size, output_size, **options)
        self.implementation = implementation

    def forward(self, input_, text: TextInputs | None = None, **options):
        """
        Args:
            input_: `[rows, 1, hidden]`.
            text: labels and weights of these rows.

        Returns:
            Without `text` what megatron-core's linear returns, else the sum of the weighted losses.
        """
        if text is None:
            return super().forward(input_, **options)
        size = self.tp_group.size()
        if size > 1 and not self.disable_grad_reduce:
            input_ = tensor_parallel.copy_to_tensor_model_parallel_region(input_, group=self.tp_group)
        shard = VocabularyShard(self.tp_group.rank(), size, self.tp_group)
        return linear_cross_entropy(
            input_.squeeze(1), self.weight, text.labels, text.label_weights, shard, implementation=self.implementation
        )


class HeadLayers(LocalLayers):
    """The layers of the head: its rule of the gradient (`disable_grad_reduce`) and its loss need our own linear.

    Args:
        loss: implementation of the loss.
    """

    def __init__(self, loss: str) -> None:
        self.loss = loss

    def column_linear(self, input_size: int, output_size: int, **options: Any) -> VocabularyLinear:
        return VocabularyLinear(input_size, output_size, implementation=self.loss, **options)


class HeadOutput(Enum):
    """What the head is asked for."""

    LOSS = "loss"
    """The sum of the weighted losses of the labelled rows, in fp32."""
    LABEL_LOGITS = "logits of the labelled rows"
    ALL_LOGITS = "logits of all tokens"


class Head(torch.nn.Module):
    """Final norm and projection to the vocabulary: the loss of the labelled rows, or logits."""

    def __init__(self, ctx: BuildContext, shape: TextShape, tied_weight: torch.nn.Parameter | None) -> None:
        super().__init__()
        self.sequence_parallel = ctx.sequence_parallel
        # Under sequence parallelism the gradient of the gathered rows is summed by the gather itself, so the norm sees
        # the part of this rank's vocabulary only, and its own gradient is summed like that of the other norms.
        self.norm = _rms_norm(ctx, shape, shape.hidden_size)
        plain = replace(ctx.without_sequence_parallel(), layers=HeadLayers(ctx.kernels.linear_cross_entropy))
        self.output = column_linear(
            plain, shape.hidden_size, shape.vocab_size, bias=False, reduce_input_grad=not ctx.sequence_parallel
        )
        if tied_weight is not None:
            self.output.weight = tied_weight

    def forward(self, x: torch.Tensor, text: TextInputs, wanted: HeadOutput) -> torch.Tensor:
        """
        Args:
            x: `[tokens (/ tp), 1, hidden]`

        Returns:
            What is wanted, logits as `[rows, vocab / tp]`.
        """
        if self.sequence_parallel:
            x = tensor_parallel.gather_from_sequence_parallel_region(x)
        if wanted is not HeadOutput.ALL_LOGITS:
            x = x.index_select(0, text.label_rows)
        if wanted is HeadOutput.LOSS:
            return self.output(self.norm(x), text)
        return self.output(self.norm(x))[0].squeeze(1)
