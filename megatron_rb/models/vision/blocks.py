"""The ViT's blocks: patch embedding, vision layers, mergers."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel

from megatron_rb.kernels.mrope.op import apply_mrope
from megatron_rb.kernels.varlen_attention.segments import Segments
from megatron_rb.kernels.window_attention.op import chosen_kernel, window_attention
from megatron_rb.models.inputs import VisionInputs
from megatron_rb.models.layers import MLP, BuildContext, column_linear, row_linear
from megatron_rb.parallel.sharding import ShardSpec, set_shard
from megatron_rb.shapes.towers import VisionShape


class PatchEmbed(torch.nn.Module):
    """Flattened patches to hidden states; Qwen3-VL adds learned positions interpolated to each image's grid."""

    def __init__(self, ctx: BuildContext, shape: VisionShape) -> None:
        super().__init__()
        self.sequence_parallel = ctx.sequence_parallel
        self.mesh = ctx.mesh
        self.weight = _replicated(ctx, shape.hidden_size, shape.patch_dim)
        self.bias = _replicated(ctx, shape.hidden_size) if shape.patch_bias else None
        side = shape.position_grid_side
        self.position = _replicated(ctx, side * side, shape.hidden_size) if side else None

    def forward(self, inputs: VisionInputs) -> torch.Tensor:
        """Returns `[patches (/ tp), 1, hidden]`."""
        assert inputs.pixels is not None, "this rank holds the patch embedding but was given no pixels"
        pixels = inputs.pixels.to(self.weight.dtype, copy=inputs.pixels_shared)
        if inputs.pixels_shared:
            # What one rank has the others have zeros for, so the sum is exact.
            dist.all_reduce(pixels, group=self.mesh.tp_group)
        hidden = torch.nn.functional.linear(pixels, self.weight, self.bias)
        if self.position is not None:
            corners = torch.nn.functional.embedding(inputs.position_indices, self.position)
            hidden = hidden + (corners * inputs.position_weights.unsqueeze(-1)).sum(1).to(hidden.dtype)
        hidden = hidden.unsqueeze(1)
        if self.sequence_parallel:
            hidden = tensor_parallel.scatter_to_sequence_parallel_region(hidden)
        return hidden


def _replicated(ctx: BuildContext, *shape: int) -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(torch.empty(shape, dtype=ctx.dtype))
    set_shard(parameter, ShardSpec(shape))
    return parameter


class VisionAttention(torch.nn.Module):
    """Bidirectional attention within windows or frames, 2-D rope. QKV rows are ordered head by head: q, k, v."""

    def __init__(self, ctx: BuildContext, shape: VisionShape, *, windowed: bool) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        self.windowed = windowed
        heads = shape.num_heads
        self.rope, self.windows = ctx.kernels.mrope, ctx.kernels.window_attention
        self.linear_qkv = column_linear(ctx, shape.hidden_size, 3 * shape.hidden_size, bias=True)
        self.core = ctx.layers.attention(ctx, heads, heads, shape.head_dim, causal=False)
        self.linear_proj = row_linear(ctx, shape.hidden_size, shape.hidden_size, bias=True)

    def forward(self, x: torch.Tensor, inputs: VisionInputs, segments: Segments) -> torch.Tensor:
        packed, _ = self.linear_qkv(x)
        qkv = packed.view(packed.shape[0], -1, 3, self.head_dim).transpose(1, 2)
        if self.windowed and chosen_kernel(qkv, segments, self.windows) != "torch":
            out = window_attention(qkv, inputs.rope_cos, inputs.rope_sin, segments, self.windows)
            return self.linear_proj(out.flatten(1).unsqueeze(1))[0]
        # One unbind, because its gradient is one stack; three indexings would each fill a gradient of zeros.
        q, k, v = qkv.unbind(1)
        q, k = apply_mrope(q, k, inputs.rope_cos, inputs.rope_sin, implementation=self.rope)
        return self.linear_proj(self.core(q, k, v, segments).unsqueeze(1))[0]


class VisionLayer(torch.nn.Module):
    """One pre-norm ViT layer."""

    def __init__(self, ctx: BuildContext, shape: VisionShape, index: int) -> None:
        super().__init__()
        self.windowed = shape.window_size > 0 and index not in shape.full_attention_layers
        self.norm1 = ctx.layers.norm(ctx, shape.norm, shape.hidden_size, shape.norm_eps)
        self.attention = VisionAttention(ctx, shape, windowed=self.windowed)
        self.norm2 = ctx.layers.norm(ctx, shape.norm, shape.hidden_size, shape.norm_eps)
        self.mlp = MLP(
            ctx, shape.hidden_size, shape.ffn_hidden_size, gated=shape.gated_mlp, bias=True, act=shape.activation
        )

    def forward(self, x: torch.Tensor, inputs: VisionInputs) -> torch.Tensor:
        segments = inputs.windows if self.windowed else inputs.frames
        assert segments is not None, "a windowed layer was given a batch without windows"
        x = x + self.attention(self.norm1(x), inputs, segments)
        return x + self.mlp(self.norm2(x))


class Merger(torch.nn.Module):
    """Joins `spatial_merge_size ** 2` neighbouring patches into one token of the language model's width.

    Args:
        norm_after_merge: DeepStack mergers normalise the joined vector, the main merger every patch.
    """

    def __init__(self, ctx: BuildContext, shape: VisionShape, *, norm_after_merge: bool) -> None:
        super().__init__()
        self.merged_size = shape.hidden_size * shape.merge_unit
        self.norm_after_merge = norm_after_merge
        size = self.merged_size if norm_after_merge else shape.hidden_size
        self.norm = ctx.layers.norm(ctx, shape.norm, size, shape.norm_eps)
        self.linear_fc1 = column_linear(ctx, self.merged_size, self.merged_size, bias=True)
        self.linear_fc2 = row_linear(ctx, self.merged_size, shape.out_hidden_size, bias=True, scatter_output=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[patches (/ tp), 1, vision hidden]` to `[patches / merge_unit, 1, text hidden]`, all rows on every rank."""
        if self.norm_after_merge:
            merged = self.norm(x.reshape(-1, 1, self.merged_size))
        else:
            merged = self.norm(x).reshape(-1, 1, self.merged_size)
        hidden, _ = self.linear_fc1(merged)
        return self.linear_fc2(torch.nn.functional.gelu(hidden))[0]
