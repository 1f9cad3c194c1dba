"""The rest of Transformer Engine that megatron-core imports: none of it is on the path of packed half precision.

What would do something says that it is not stood in for.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from megatron_rb.rehearsal.packages import te_attention, te_base, te_linear, te_norm, te_optimizers
from megatron_rb.rehearsal.packages.te_base import refuse, refused, refused_class

Linear, LayerNorm, RMSNorm = te_linear.Linear, te_norm.LayerNorm, te_norm.RMSNorm
DotProductAttention, TransformerEngineBaseModule = te_attention.DotProductAttention, te_base.TransformerEngineBaseModule
LayerNormLinear, LayerNormMLP = refused_class("LayerNormLinear"), refused_class("LayerNormMLP")
GroupedLinear, CudaRNGStatesTracker = refused_class("GroupedLinear"), refused_class("CudaRNGStatesTracker")
Sequential, FusibleOperation = refused_class("ops.Sequential"), refused_class("ops.FusibleOperation")
DelayedScaling, QuantizedTensor = refused_class("DelayedScaling"), refused_class("QuantizedTensor")
fused_compute_score_for_moe_aux_loss = refused("fused_compute_score_for_moe_aux_loss")
fused_moe_aux_loss = refused("fused_moe_aux_loss")
fused_topk_with_score_function = refused("fused_topk_with_score_function")
checkpoint = refused("checkpoint")


class FP8GlobalStateManager:
    """FP8 is off."""

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return False

    @classmethod
    def fp8_graph_capturing(cls) -> bool:
        return False


def fp8_autocast(enabled: bool = True, calibrating: bool = False, fp8_recipe=None, fp8_group=None, _graph=False) -> Any:
    """A block without FP8.

    Raises:
        NotImplementedError: FP8 is asked for.
    """
    if enabled or calibrating:
        refuse("FP8")
    return nullcontext()


def activation_recompute_forward(activation_recompute: bool = False, recompute_phase: bool = False) -> Any:
    """A block that sets what FP8 needs of recomputation: nothing."""
    return nullcontext()


def is_fp8_activation_recompute_enabled() -> bool:
    return False


multi_tensor_l2norm, multi_tensor_scale = te_optimizers.multi_tensor_l2norm, te_optimizers.multi_tensor_scale

__all__ = [
    "CudaRNGStatesTracker",
    "DelayedScaling",
    "DotProductAttention",
    "FP8GlobalStateManager",
    "FusibleOperation",
    "GroupedLinear",
    "LayerNorm",
    "LayerNormLinear",
    "LayerNormMLP",
    "Linear",
    "QuantizedTensor",
    "RMSNorm",
    "Sequential",
    "TransformerEngineBaseModule",
    "activation_recompute_forward",
    "checkpoint",
    "fp8_autocast",
    "fused_compute_score_for_moe_aux_loss",
    "fused_moe_aux_loss",
    "fused_topk_with_score_function",
    "is_fp8_activation_recompute_enabled",
    "multi_tensor_l2norm",
    "multi_tensor_scale",
]
