"""`transformer_engine.pytorch.DotProductAttention` as a rehearsal stands in for it, on packed sequences (`thd`).

Signature, checks and choice of `pytorch/attention/dot_product_attention/` and saved tensors of
`common/fused_attn/fused_attn_f16_arbitrary_seqlen.cu` in v2.9 of github.com/NVIDIA/TransformerEngine. From Hopper on it
takes cuDNN; before it takes flash-attn 2, in the releases that it supports.
"""

from __future__ import annotations

from importlib import import_module, metadata
from typing import Any

import torch
from packaging.version import Version

from megatron_rb.rehearsal.arithmetic import BACKWARD, FORWARD
from megatron_rb.rehearsal.packages.te_base import TransformerEngineBaseModule, refuse, world_size
from megatron_rb.rehearsal.packages.varlen import HALF, Borders, check_values

__all__ = ["DotProductAttention"]

MASKS = (
    "no_mask",
    "padding",
    "causal",
    "padding_causal",
    "causal_bottom_right",
    "padding_causal_bottom_right",
    "arbitrary",
)
FLASH_ATTN = Version("2.1.1"), Version("2.8.1")
"""First and last release of flash-attn 2 that it takes."""
MOST_HEAD_DIM = 256
"""Of cuDNN on Hopper."""


class DotProductAttention(TransformerEngineBaseModule):
    """Attention with the kernel that the device and the call allow."""

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
        softmax_type="vanilla",
        return_max_logit=False,
    ) -> None:
        super().__init__()
        assert attention_type in ("self", "cross"), f"attention_type {attention_type} not supported"
        if cp_group is not None or softmax_type != "vanilla" or return_max_logit:
            refuse("context parallelism of its own, other softmaxes and largest logits")
        self.qkv_format, self.window_size = qkv_format, window_size
        self.attn_mask_type = attn_mask_type.replace(",", "_")
        self.tp_size = tp_size if tp_group is None else world_size(tp_group)
        self.set_tensor_parallel_group(tp_group)
        groups = num_attention_heads if num_gqa_groups is None else num_gqa_groups
        assert num_attention_heads % groups == 0, (
            "The number of attention heads must be divisible by the number of GQA groups!"
        )
        self.head_dims = (kv_channels, kv_channels) if isinstance(kv_channels, int) else tuple(kv_channels)
        self.num_gqa_groups_per_partition = groups // self.tp_size

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
        fp8_output=False,
    ):
        """`[tokens, heads * head_dim]` of q `[tokens, heads, head_dim]`.

        Raises:
            AssertionError, ValueError: an argument is refused, in the words of the package.
            NotImplementedError: for what training with packed sequences does not use.
        """
        others = (cu_seqlens_q_padded, cu_seqlens_kv_padded, core_attention_bias, alibi_slopes, inference_params)
        if any(each is not None for each in others) or checkpoint_core_attention or fp8_output:
            refuse("padding between sequences, biases, inference, its own checkpoints and FP8")
        if (qkv_format or self.qkv_format) != "thd":
            refuse("attention of sequences that are not packed")
        q = self.prepare(query_layer, allow_non_contiguous=True)
        self._check(q, key_layer, value_layer)
        mask = (attn_mask_type or self.attn_mask_type).replace(",", "_")
        assert mask in MASKS, f"Attention mask type {mask} is not supported!"
        assert "padding" in mask, "Attention mask type must be padding or padding_causal for qkv_format=thd!"
        _check_borders(cu_seqlens_q, cu_seqlens_kv)
        if max_seqlen_q is None or max_seqlen_kv is None:
            (cu_seqlens_q[1:] - cu_seqlens_q[:-1]).max().item()
        window = _window(window_size or self.window_size, mask)
        borders = Borders(cu_seqlens_q, cu_seqlens_kv, window)
        check_values(borders, q.shape[0], key_layer.shape[0])
        longest = int(max_seqlen_q or 0), int(max_seqlen_kv or 0)
        return _attention(q, key_layer, value_layer, borders, longest).reshape(q.shape[0], -1)

    def _check(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        assert all(x.device.type == "cuda" for x in (q, k, v)), "DotProductAttention only supports CUDA tensors."
        assert q.dtype == k.dtype == v.dtype, "Queries, keys and values must have the same data type!"
        assert k.shape[:-1] == v.shape[:-1], (
            "Keys and values must have the same batch size, sequence length and number of heads!"
        )
        assert q.shape[-1] == k.shape[-1], "Queries and keys must have the same head dimension!"
        for name, x, expected in (("Keys", q, self.head_dims[0]), ("Values", v, self.head_dims[1])):
            assert x.shape[-1] == expected, f"{name} have head_dim = {x.shape[-1]}, but expected {expected}!"
        groups = self.num_gqa_groups_per_partition
        assert k.shape[-2] == groups, f"Keys and values must have num_gqa_group = {groups} heads! Found {k.shape[-2]}."
        assert all(x.dim() == 3 for x in (q, k, v)), (
            "Queries, keys and values must be 3D tensors when qkv_format = thd!"
        )


def _check_borders(queries: torch.Tensor, keys: torch.Tensor) -> None:
    assert queries is not None and keys is not None, (
        "cu_seqlens_q and cu_seqlens_kv can not be None when qkv_format = thd!"
    )
    assert queries.shape == keys.shape and queries.dim() == 1, (
        "cu_seqlens_q and cu_seqlens_q must both have shape [batch_size + 1]!"
    )
    assert queries.dtype == keys.dtype == torch.int32, (
        "cu_seqlens_q and cu_seqlens_q must both be in dtype torch.int32!"
    )


def _window(asked: tuple[int, int] | None, mask: str) -> tuple[int, int]:
    left, right = asked or (-1, -1)
    return left, 0 if "causal" in mask else right


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, borders: Borders, longest: tuple[int, int]
) -> torch.Tensor:
    """The kernel that `get_attention_backend` takes.

    Raises:
        ValueError: none can.
    """
    arch = torch.cuda.get_device_capability()
    fits = q.dtype in HALF and q.shape[-1] % 8 == 0 and q.shape[-1] <= MOST_HEAD_DIM
    if fits and (9, 0) <= arch < (12, 0):
        return FusedAttnFunc.apply(q, k, v, borders)
    if fits and arch >= (8, 0) and _flash_attn_is_supported():
        flash = import_module("flash_attn").flash_attn_varlen_func
        return flash(
            q, k, v, borders.queries, borders.keys, *longest, causal=borders.window[1] == 0, window_size=borders.window
        )
    raise ValueError(
        f"No dot product attention backend is available for the provided inputs: {q.dtype}, head_dim {q.shape[-1]}, "
        f"packed sequences on compute capability {arch[0]}.{arch[1]} with flash-attn "
        f"{_flash_attn() or 'not installed'} (supported: {FLASH_ATTN[0]} to {FLASH_ATTN[1]}). "
        "Please run with NVTE_DEBUG=1 NVTE_DEBUG_LEVEL=2"
    )


def _flash_attn() -> str:
    """Its release; empty = it is not installed."""
    return next((each.version for each in metadata.distributions(name="flash-attn")), "")


def _flash_attn_is_supported() -> bool:
    release = _flash_attn()
    return bool(release) and FLASH_ATTN[0] <= Version(release) <= FLASH_ATTN[1]


class FusedAttnFunc(torch.autograd.Function):
    """cuDNN's; workspaces of its own are not allocated."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, borders: Borders) -> torch.Tensor:
        out = q.new_empty((*q.shape[:-1], v.shape[-1]))
        statistics = q.new_empty((q.shape[0], q.shape[1], 1), dtype=torch.float32)
        rng_state = q.new_empty(2, dtype=torch.int64)
        ctx.save_for_backward(q, k, v, out, borders.queries, borders.keys, statistics, rng_state)
        ctx.borders = borders
        borders.count(q, FORWARD)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, *_ = ctx.saved_tensors
        grad = grads[0].contiguous()
        assert grad.dtype == q.dtype, "Queries, keys and values must have the same data type!"
        ctx.borders.count(q, BACKWARD)
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None
