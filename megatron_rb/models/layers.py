"""The layer implementations a model is built from: megatron-core's own with torch, or Transformer Engine's."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rb.config.schema import KernelsConfig
from megatron_rb.kernels.rms_norm.op import rms_norm
from megatron_rb.kernels.swiglu.op import swiglu
from megatron_rb.kernels.varlen_attention.op import varlen_attention
from megatron_rb.kernels.varlen_attention.segments import Segments
from megatron_rb.parallel.mesh import Mesh
from megatron_rb.parallel.sharding import ShardSpec, set_shard, with_shape


class LayerProvider(Protocol):
    """The layers of one implementation; all keep the parameter names `weight` and `bias`."""

    name: str

    def column_linear(self, input_size: int, output_size: int, **options: Any) -> torch.nn.Module:
        """Called as megatron-core's `ColumnParallelLinear`."""
        ...

    def row_linear(self, input_size: int, output_size: int, **options: Any) -> torch.nn.Module:
        """Called as megatron-core's `RowParallelLinear`."""
        ...

    def norm(self, ctx: BuildContext, kind: str, size: int, eps: float) -> torch.nn.Module:
        """`rmsnorm` or `layernorm` over the last dimension."""
        ...

    def attention(self, ctx: BuildContext, heads: int, groups: int, head_dim: int, *, causal: bool) -> PackedAttention:
        """Attention over packed sequences.

        Args:
            heads, groups: query heads and key-value heads of the layer, over all tensor-parallel ranks.
        """
        ...


class PackedAttention(Protocol):
    """A module without parameters."""

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, keys: Segments | None = None
    ) -> torch.Tensor:
        """
        Args:
            q: `[tokens, heads, head_dim]`, the heads of this rank; k, v: `[keys, groups, head_dim]`.
            keys: for every segment of q one of k and v, which begins earlier or with it; None = they are the same.

        Returns:
            `[tokens, heads * head_dim]`
        """
        ...


@dataclass(frozen=True)
class BuildContext:
    """What every block needs to know to build its slice of the weights."""

    config: TransformerConfig
    layers: LayerProvider
    mesh: Mesh
    kernels: KernelsConfig = field(default_factory=KernelsConfig)

    @property
    def tp_size(self) -> int:
        return self.mesh.tp_size

    @property
    def sequence_parallel(self) -> bool:
        return self.config.sequence_parallel

    @property
    def dtype(self) -> torch.dtype:
        return self.config.params_dtype

    def without_sequence_parallel(self) -> BuildContext:
        """For layers whose rows every rank needs."""
        config = copy(self.config)
        config.sequence_parallel = False
        return replace(self, config=config)


class ColumnLinear(tensor_parallel.ColumnParallelLinear):
    """megatron-core's column-parallel linear; without communication it is one fused torch call."""

    def _forward_impl(self, input, weight, *args, **kwargs):
        return _linear(super()._forward_impl, input, weight, *args, **kwargs)


class RowLinear(tensor_parallel.RowParallelLinear):
    """megatron-core's row-parallel linear; without communication it is one fused torch call."""

    def _forward_impl(self, input, weight, *args, **kwargs):
        return _linear(super()._forward_impl, input, weight, *args, **kwargs)


def _linear(general, input, weight, *args, **kwargs):
    communicates = kwargs.get("allreduce_dgrad") or kwargs.get("sequence_parallel")
    if communicates or kwargs.get("gradient_accumulation_fusion"):
        return general(input, weight, *args, **kwargs)
    return F.linear(input, weight, kwargs.get("bias"))


class LocalAttention(torch.nn.Module):
    """Attention over packed sequences by the best kernel that is installed; torch's SDPA everywhere else."""

    def __init__(self, causal: bool, implementation: str) -> None:
        super().__init__()
        self.causal = causal
        self.implementation = implementation

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, keys: Segments | None = None
    ) -> torch.Tensor:
        return varlen_attention(q, k, v, segments, self.causal, self.implementation, keys).flatten(1)


class LocalLayers:
    """megatron-core's tensor-parallel linears, norms and attention on torch: every platform has them."""

    name = "local"

    def column_linear(self, input_size: int, output_size: int, **options: Any) -> ColumnLinear:
        return ColumnLinear(input_size, output_size, **options)

    def row_linear(self, input_size: int, output_size: int, **options: Any) -> RowLinear:
        return RowLinear(input_size, output_size, **options)

    def norm(self, ctx: BuildContext, kind: str, size: int, eps: float) -> torch.nn.Module:
        return {"rmsnorm": RMSNorm, "layernorm": LayerNorm}[kind](ctx, size, eps)

    def attention(self, ctx: BuildContext, heads: int, groups: int, head_dim: int, *, causal: bool) -> LocalAttention:
        return LocalAttention(causal, ctx.kernels.varlen_attention)


def column_linear(
    ctx: BuildContext, input_size: int, output_size: int, *, bias: bool, stride: int = 1, reduce_input_grad: bool = True
) -> torch.nn.Module:
    """A linear whose output features are shared by the tensor-parallel ranks.

    Args:
        output_size: global and unpadded; `stride` parts of it are fused and each is cut.
        reduce_input_grad: false when the caller sums the gradient of the input over the ranks itself.
    """
    spec = ShardSpec((output_size, input_size), dim=0, stride=stride)
    padded = spec.local_shape(ctx.tp_size)[0] * ctx.tp_size
    extra = {} if reduce_input_grad else {"disable_grad_reduce": True}
    layer = ctx.layers.column_linear(
        input_size,
        padded,
        config=ctx.config,
        init_method=_no_init,
        bias=bias,
        gather_output=False,
        skip_bias_add=False,
        is_expert=False,
        **extra,
    )
    return _place(layer, spec, with_shape(spec, (output_size,)), ctx.sequence_parallel)


def row_linear(
    ctx: BuildContext, input_size: int, output_size: int, *, bias: bool, scatter_output: bool = True
) -> torch.nn.Module:
    """A linear whose input features are shared by the tensor-parallel ranks.

    Args:
        input_size: global and unpadded.
        scatter_output: under sequence parallelism give each rank its rows; false = every rank gets all rows.
    """
    config = (ctx if scatter_output else ctx.without_sequence_parallel()).config
    spec = ShardSpec((output_size, input_size), dim=1)
    padded = spec.local_shape(ctx.tp_size)[1] * ctx.tp_size
    layer = ctx.layers.row_linear(
        padded,
        output_size,
        config=config,
        init_method=_no_init,
        bias=bias,
        input_is_parallel=True,
        skip_bias_add=False,
        is_expert=False,
    )
    return _place(layer, spec, ShardSpec((output_size,)), config.sequence_parallel)


def _place(layer: torch.nn.Module, weight: ShardSpec, bias: ShardSpec, rows_split: bool) -> torch.nn.Module:
    layer.rows_split = rows_split  # type: ignore[assignment]
    specs = {"weight": weight, "bias": bias}
    for name, parameter in layer.named_parameters(recurse=False):
        mark_shard(parameter, specs[name])
    return layer


def has_split_rows(layer: torch.nn.Module) -> bool:
    """Whether a linear takes the rows of its rank alone (cut by outputs), or gives those alone (cut by inputs)."""
    return cast(bool, layer.rows_split)


def mark_shard(parameter: torch.nn.Parameter, spec: ShardSpec) -> None:
    """State the placement of a parameter, for this stack and in megatron-core's own terms.

    megatron-core sets its attributes only when it draws the weights itself; without them the gradient norm would count
    one rank's part of the weight.
    """
    set_shard(parameter, spec)
    if spec.dim is not None and not getattr(parameter, "tensor_model_parallel", False):
        tensor_parallel.set_tensor_model_parallel_attributes(parameter, True, spec.dim, spec.stride)


def _no_init(weight: torch.Tensor) -> None:
    """Weights are drawn or loaded by name after the model is built."""


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm, statistics in fp32, `weight` applied in the type of the input (as transformers does)."""

    def __init__(self, ctx: BuildContext, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.implementation = ctx.kernels.rms_norm
        self.weight = _norm_parameter(ctx, size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps, self.implementation)


class HeadNorm(torch.nn.Module):
    """Weight of the norm over each head's values, which one operator applies together with the rotation.

    A module of its own, and called like one, so that data parallelism's hooks gather the weight before it is read.
    """

    def __init__(self, ctx: BuildContext, head_dim: int) -> None:
        super().__init__()
        self.weight = _norm_parameter(ctx, head_dim)

    def forward(self) -> torch.Tensor:
        return self.weight


class LayerNorm(torch.nn.Module):
    """Layer norm with weight and bias."""

    def __init__(self, ctx: BuildContext, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _norm_parameter(ctx, size)
        self.bias = _norm_parameter(ctx, size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def _norm_parameter(ctx: BuildContext, size: int) -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(torch.empty(size, dtype=ctx.dtype))
    mark_norm_parameter(parameter, ctx)
    return parameter


def mark_norm_parameter(parameter: torch.nn.Parameter, ctx: BuildContext) -> None:
    """State that every rank holds all of a norm's parameter, and what its gradient is."""
    set_shard(parameter, ShardSpec(tuple(parameter.shape)))
    # Each rank sees only its rows of the tokens, so the gradients of all ranks must be summed.
    parameter.sequence_parallel = ctx.sequence_parallel  # type: ignore[attr-defined]


def activation(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """An activation by its Hugging Face name."""
    known: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
        "relu": F.relu,
    }
    if name not in known:
        raise ValueError(f"hidden_act '{name}' is not supported; known are {', '.join(known)}")
    return known[name]


class MLP(torch.nn.Module):
    """Two linears around an activation; gated (`act(gate) * up`) or plain."""

    def __init__(
        self, ctx: BuildContext, hidden_size: int, ffn_hidden_size: int, *, gated: bool, bias: bool, act: str
    ) -> None:
        super().__init__()
        self.gated = gated
        # The usual gate has an operator of its own.
        self.swiglu = ctx.kernels.swiglu if gated and act == "silu" else None
        parts = 2 if gated else 1
        self.linear_fc1 = column_linear(ctx, hidden_size, parts * ffn_hidden_size, bias=bias, stride=parts)
        self.linear_fc2 = row_linear(ctx, ffn_hidden_size, hidden_size, bias=bias)
        self.act = activation(act)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden, _ = self.linear_fc1(x)
        if self.swiglu is not None:
            hidden = swiglu(hidden, self.swiglu)
        elif self.gated:
            gate, up = hidden.chunk(2, dim=-1)
            hidden = self.act(gate) * up
        else:
            hidden = self.act(hidden)
        return self.linear_fc2(hidden)[0]
