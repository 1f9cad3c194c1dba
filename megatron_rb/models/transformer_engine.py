"""Transformer Engine's layers, through megatron-core's wrappers; import this only where the package is installed."""

from __future__ import annotations

from copy import copy
from enum import Enum
from typing import Any

import torch
from megatron.core.extensions import transformer_engine as te
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rb.kernels.varlen_attention.segments import Segments
from megatron_rb.models.layers import BuildContext, mark_norm_parameter


class BottomRight(Enum):
    """A mask type of Transformer Engine that megatron-core's own list lacks; its wrapper hands on the name alone."""

    padding_causal_bottom_right = 1


class TransformerEngineLayers:
    """Linears, norms and packed attention of Transformer Engine. Its norms apply their weight in fp32."""

    name = "transformer_engine"

    def column_linear(self, input_size: int, output_size: int, **options: Any) -> torch.nn.Module:
        options["config"] = _te_config(options["config"])
        return te.TEColumnParallelLinear(input_size, output_size, **options)

    def row_linear(self, input_size: int, output_size: int, **options: Any) -> torch.nn.Module:
        options["config"] = _te_config(options["config"])
        return te.TERowParallelLinear(input_size, output_size, **options)

    def norm(self, ctx: BuildContext, kind: str, size: int, eps: float) -> torch.nn.Module:
        names = {"rmsnorm": "RMSNorm", "layernorm": "LayerNorm"}
        layer = te.TENorm(_te_config(ctx.config, normalization=names[kind]), size, eps)
        for parameter in layer.parameters():
            mark_norm_parameter(parameter, ctx)
        return layer

    def attention(
        self, ctx: BuildContext, heads: int, groups: int, head_dim: int, *, causal: bool
    ) -> TransformerEngineAttention:
        # Vision and text layers differ in their heads, and the configuration knows only those of the text.
        config = _te_config(ctx.config, num_attention_heads=heads, num_query_groups=groups, kv_channels=head_dim)
        return TransformerEngineAttention(config, causal)


def _te_config(config: TransformerConfig, **changes) -> TransformerConfig:
    """A configuration under which megatron-core's wrappers make parameters on the device the model is built on."""
    config = copy(config)
    # With the first switch on they would all be made on the host and stay there.
    config.use_cpu_initialization = False
    config.init_model_with_meta_device = torch.get_default_device().type == "meta"
    for name, value in changes.items():
        setattr(config, name, value)
    return config


class TransformerEngineAttention(torch.nn.Module):
    """Transformer Engine's choice of flash-attention and cuDNN, on sequences packed without padding (`thd`)."""

    def __init__(self, config: TransformerConfig, causal: bool) -> None:
        super().__init__()
        self.mask = AttnMaskType.padding_causal if causal else AttnMaskType.padding
        # The number tells layers apart only in debugging output and when logits are scaled by depth, which is off.
        self.attention = te.TEDotProductAttention(
            config, layer_number=1, attn_mask_type=self.mask, attention_type="self"
        )

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, keys: Segments | None = None
    ) -> torch.Tensor:
        seen = segments if keys is None else keys
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=segments.cu_seqlens,
            cu_seqlens_kv=seen.cu_seqlens,
            max_seqlen_q=segments.max_length,
            max_seqlen_kv=seen.max_length,
        )
        # The last query of a segment is that of its last key.
        mask = self.mask if keys is None else BottomRight.padding_causal_bottom_right
        out = self.attention(q, k, v, None, mask, packed_seq_params=packed)
        return out.reshape(out.shape[0], -1)
