"""Stands in for Transformer Engine on CPU: its modules' signatures (release 2.6), computed with plain torch.

What it cannot show: the kernels themselves, their types and speed. What it does show: that megatron-core's wrappers are
built with arguments the real modules take, and that the parameters, their shards and their gradients are right.
"""

from __future__ import annotations

import contextlib
import sys
import types

import torch
import torch.nn.functional as F

CALLS: dict[str, int] = {}
"""How often each layer of the stand-in ran in this process."""


def install() -> None:
    """Put the stand-in in the place of the package; call it before anything imports megatron.core."""
    assert "megatron.core" not in sys.modules, "megatron.core has already looked for Transformer Engine"
    layers = {
        "Linear": Linear,
        "LayerNorm": LayerNorm,
        "RMSNorm": RMSNorm,
        "DotProductAttention": DotProductAttention,
        "LayerNormLinear": _NotUsed,
        "GroupedLinear": _NotUsed,
    }
    pytorch = _module("transformer_engine.pytorch", **layers)
    pytorch.ops = _module("transformer_engine.pytorch.ops", Sequential=_NotUsed, FusibleOperation=_NotUsed)  # type: ignore[attr-defined]
    pytorch.distributed = _module(  # type: ignore[attr-defined]
        "transformer_engine.pytorch.distributed", CudaRNGStatesTracker=_NotUsed, activation_recompute_forward=None
    )
    _module("transformer_engine.pytorch.fp8", FP8GlobalStateManager=_NoFp8, fp8_autocast=contextlib.nullcontext)
    _module("transformer_engine.pytorch.tensor", QuantizedTensor=_NotUsed)
    _module("transformer_engine.pytorch.float8_tensor", Float8Tensor=_NotUsed)
    recipe = _module("transformer_engine.common.recipe", DelayedScaling=_NotUsed)
    common = _module("transformer_engine.common", recipe=recipe)
    _module("transformer_engine", __version__="2.6.0", pytorch=pytorch, common=common)
    # megatron-core builds these layers on `torch.cuda.current_device()`; here that device is the CPU.
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment,return-value]


def _module(name: str, **members) -> types.ModuleType:
    module = types.ModuleType(name)
    vars(module).update(members)
    sys.modules[name] = module
    return module


class _NotUsed:
    """A class megatron-core derives from at import and this stack never builds."""


class _NoFp8:
    @staticmethod
    def is_fp8_enabled() -> bool:
        return False


class Linear(torch.nn.Module):
    def __init__(
        self,
        in_features,
        out_features,
        sequence_parallel=False,
        fuse_wgrad_accumulation=False,
        tp_group=None,
        tp_size=1,
        get_rng_state_tracker=None,
        rng_tracker_name=None,
        init_method=None,
        bias=True,
        return_bias=False,
        params_dtype=None,
        parallel_mode=None,
        parameters_split=None,
        device="cuda",
        ub_overlap_ag=False,
        ub_overlap_rs=False,
        ub_overlap_rs_dgrad=False,
        ub_bulk_dgrad=False,
        ub_bulk_wgrad=False,
        ub_name=None,
        delay_wgrad_compute=False,
        symmetric_ar_type=None,
        save_original_input=False,
        name=None,
    ) -> None:
        super().__init__()
        assert parallel_mode in ("column", "row") and not return_bias and not fuse_wgrad_accumulation
        self.parallel_mode, self.tp_group = parallel_mode, tp_group
        self.sequence_parallel = sequence_parallel and tp_size > 1
        column = parallel_mode == "column"
        rows, columns = (out_features // tp_size, in_features) if column else (out_features, in_features // tp_size)
        self.weight = torch.nn.Parameter(torch.empty(rows, columns, dtype=params_dtype, device=device))
        self.weight.tensor_model_parallel, self.weight.partition_dim = True, 0 if column else 1
        self.weight.partition_stride = 1
        self.bias = torch.nn.Parameter(torch.empty(rows, dtype=params_dtype, device=device)) if bias else None
        if self.bias is not None and column:
            self.bias.tensor_model_parallel, self.bias.partition_dim, self.bias.partition_stride = True, 0, 1
        elif self.bias is not None:
            self.bias.sequence_parallel = self.sequence_parallel

    def forward(self, inp, is_first_microbatch=None, fp8_output=False, fp8_grad=False):
        from megatron.core.tensor_parallel import mappings

        CALLS["linear"] = CALLS.get("linear", 0) + 1
        if self.parallel_mode == "column":
            if self.sequence_parallel:
                inp = mappings.gather_from_sequence_parallel_region(inp)
            else:
                inp = mappings.copy_to_tensor_model_parallel_region(inp)
            return F.linear(inp, self.weight, self.bias)
        out = F.linear(inp, self.weight)
        if self.sequence_parallel:
            out = mappings.reduce_scatter_to_sequence_parallel_region(out)
        else:
            out = mappings.reduce_from_tensor_model_parallel_region(out)
        return out if self.bias is None else out + self.bias


class _Norm(torch.nn.Module):
    names: tuple[str, ...] = ("weight",)

    def __init__(
        self,
        normalized_shape=None,
        eps=1e-5,
        sequence_parallel=None,
        params_dtype=None,
        zero_centered_gamma=False,
        hidden_size=None,
        *,
        device=None,
        dtype=None,
        sm_margin=0,
    ) -> None:
        super().__init__()
        assert (normalized_shape is None) != (hidden_size is None) and not zero_centered_gamma
        self.eps = eps
        for name in self.names:
            size = normalized_shape or hidden_size
            parameter = torch.nn.Parameter(torch.empty(size, dtype=params_dtype or dtype, device=device))
            parameter.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]
            self.register_parameter(name, parameter)


class RMSNorm(_Norm):
    def forward(self, x):
        CALLS["rmsnorm"] = CALLS.get("rmsnorm", 0) + 1
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class LayerNorm(_Norm):
    names = ("weight", "bias")

    def forward(self, x):
        CALLS["layernorm"] = CALLS.get("layernorm", 0) + 1
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class DotProductAttention(torch.nn.Module):
    def __init__(
        self,
        num_attention_heads,
        kv_channels,
        num_gqa_groups=None,
        attention_dropout=0.0,
        qkv_format="sbhd",
        attn_mask_type="causal",
        window_size=None,
        sequence_parallel=False,
        tp_size=1,
        get_rng_state_tracker=None,
        tp_group=None,
        layer_number=None,
        attention_type="self",
        cp_group=None,
        cp_global_ranks=None,
        cp_stream=None,
        cp_comm_type="p2p",
        softmax_scale=None,
    ) -> None:
        super().__init__()
        assert attention_dropout == 0.0
        tp_size = tp_group.size() if tp_group is not None else tp_size
        self.heads, self.groups = num_attention_heads // tp_size, num_gqa_groups // tp_size
        self.head_dim = kv_channels
        self.scale = softmax_scale

    def forward(
        self,
        query_layer,
        key_layer,
        value_layer,
        attention_mask=None,
        qkv_format=None,
        cu_seqlens_q=None,
        cu_seqlens_kv=None,
        cu_seqlens_q_padded=None,
        cu_seqlens_kv_padded=None,
        max_seqlen_q=None,
        max_seqlen_kv=None,
        attn_mask_type=None,
        window_size=None,
        checkpoint_core_attention=False,
        core_attention_bias_type="no_bias",
        core_attention_bias=None,
        alibi_slopes=None,
        fast_zero_fill=True,
        inference_params=None,
        pad_between_seqs=None,
    ):
        CALLS["attention"] = CALLS.get("attention", 0) + 1
        assert qkv_format == "thd" and attention_mask is None
        assert attn_mask_type in ("padding", "padding_causal", "padding_causal_bottom_right")
        assert query_layer.shape[1:] == (self.heads, self.head_dim), (query_layer.shape, self.heads, self.head_dim)
        assert key_layer.shape == value_layer.shape and key_layer.shape[1:] == (self.groups, self.head_dim)
        assert cu_seqlens_q.dtype == cu_seqlens_kv.dtype == torch.int32
        lengths, seen = cu_seqlens_q.diff(), cu_seqlens_kv.diff()
        assert max_seqlen_q == int(lengths.max()) and max_seqlen_kv == int(seen.max())
        assert cu_seqlens_q[-1] == len(query_layer) and cu_seqlens_kv[-1] == len(key_layer)
        # One masked attention over all tokens: written apart from the product's path, which goes segment by segment.
        number, key_number = (torch.repeat_interleave(torch.arange(len(x)), x) for x in (lengths, seen))
        mask = number[:, None] == key_number[None]
        if attn_mask_type != "padding":
            # Places within a segment, counted from its first row, or from the last one where the mask says so.
            origin = (
                (cu_seqlens_q[1:], cu_seqlens_kv[1:])
                if attn_mask_type.endswith("right")
                else (cu_seqlens_q[:-1], cu_seqlens_kv[:-1])
            )
            place = torch.arange(len(number)) - origin[0][number]
            key_place = torch.arange(len(key_number)) - origin[1][key_number]
            mask = mask & (key_place[None] <= place[:, None])
        q, k, v = (x.transpose(0, 1)[None] for x in (query_layer, key_layer, value_layer))
        out = F.scaled_dot_product_attention(q, k, v, mask, scale=self.scale, enable_gqa=self.heads != self.groups)
        return out[0].transpose(0, 1).flatten(1)
