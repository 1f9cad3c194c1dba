"""A Moore Threads device that is not there: torch_musa and its attention are stood in for.

What torch_musa 2.7.1 (github.com/MooreThreads/torch_musa) adds to torch: the device type `musa`, the module torch.musa,
the backend `mccl`, and a flash attention behind `scaled_dot_product_attention` (`csrc/aten/ops/attention/mudnn/`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_rb.platform.rehearsal import REHEARSED
from megatron_rb.rehearsal.arithmetic import BACKWARD, FORWARD, current_arithmetic, visible_pairs
from megatron_rb.rehearsal.device import DataSheet, Waits, answers_of, stand_in_for_tensors
from megatron_rb.rehearsal.stand_ins import StandIns

DEVICE_TYPE, BACKEND = "musa", "mccl"
FIRST_FLASH_ARCH = (2, 2)
MOST_HEAD_DIM = 128
OTHER_HEAD_DIMS = ((192, 128), (160, 160))
"""Of queries and of values, which its flash attention takes as well."""
HALF = (torch.float16, torch.bfloat16)


def stand_in_for_musa(stand_ins: StandIns, sheet: DataSheet, waits: Waits) -> Callable[[torch.Tensor], bool]:
    """Let torch be one with torch_musa on the device of a data sheet; the device type keeps its name in this process.

    Returns:
        Whether a CPU tensor is in page-locked memory.
    """
    if torch._C._get_privateuse1_backend_name() != DEVICE_TYPE:
        torch.utils.rename_privateuse1_backend(DEVICE_TYPE)
        torch.utils.generate_methods_for_privateuse1_backend(for_storage=False, for_packed_sequence=False)
    runtime = ModuleType(f"torch.{DEVICE_TYPE}")
    answers = {name: value for name, value in answers_of(sheet, waits, DEVICE_TYPE).items() if name not in ABSENT}
    for name, value in (answers | MORE_ANSWERS | {REHEARSED: True}).items():
        setattr(runtime, name, value)
    stand_ins.set(torch, DEVICE_TYPE, runtime)
    package = ModuleType("torch_musa")
    package.__spec__ = ModuleSpec("torch_musa", None, origin="rehearsed")
    for name, module in (("torch_musa", package), (f"torch.{DEVICE_TYPE}", runtime)):
        sys.modules[name] = module
        stand_ins.later(lambda name=name: sys.modules.pop(name))  # type: ignore[misc]
    stand_ins.set(torch.version, "musa", "4.3.6")
    stand_ins.set(dist.Backend, "backend_list", [*dist.Backend.backend_list, BACKEND])
    stand_ins.set(F, "scaled_dot_product_attention", _attention_beside(F.scaled_dot_product_attention, sheet))
    return stand_in_for_tensors(stand_ins)


ABSENT = ("nvtx", "nccl", "init")
"""Names of torch.cuda that torch.musa does not have."""
MORE_ANSWERS: dict[str, Any] = {
    "_is_in_bad_fork": lambda: False,
    "get_amp_supported_dtype": lambda: [torch.float16, torch.bfloat16],
}


def _attention_beside(composed: Any, sheet: DataSheet) -> Any:
    """`scaled_dot_product_attention` as `_fused_sdp_choice_musa` directs it: flash, else torch's composition."""

    def scaled_dot_product_attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        if query.device.type != DEVICE_TYPE or not _takes_flash(query, value, sheet):
            return composed(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if not query.dtype == key.dtype == value.dtype:
            raise RuntimeError(f"query is {query.dtype}, key {key.dtype} and value {value.dtype}")
        if is_causal and attn_mask is not None:
            raise RuntimeError("MUSA SPDA: Explicit attn_mask should not be set when is_causal=True")
        return MuDNNFlashSDPA.apply(query, key, value, attn_mask, is_causal)

    return scaled_dot_product_attention


def _takes_flash(query: torch.Tensor, value: torch.Tensor, sheet: DataSheet) -> bool:
    heads = query.shape[-1], value.shape[-1]
    fits = max(heads) <= MOST_HEAD_DIM or heads in OTHER_HEAD_DIMS
    return query.dtype in HALF and fits and sheet.capability >= FIRST_FLASH_ARCH and query.dim() == 4


class MuDNNFlashSDPA(torch.autograd.Function):
    """Keeps its inputs, the output and the log-sum-exp in fp32; workspaces of muDNN are not allocated."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        causal: bool,
    ) -> torch.Tensor:
        batch, heads, rows, _ = query.shape
        out = query.new_empty((batch, rows, heads, value.shape[-1])).transpose(1, 2)
        lse = query.new_empty((batch, heads, rows), dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, lse, mask)
        ctx.causal = causal
        _count(FORWARD, query, key, causal)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, *_ = ctx.saved_tensors
        held = grads[0].contiguous()
        _count(BACKWARD, query, key, ctx.causal)
        del held
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None, None


def _count(flops: int, query: torch.Tensor, key: torch.Tensor, causal: bool) -> None:
    """Masks are counted as if they hid nothing, as torch counts its own attention."""
    arithmetic = current_arithmetic()
    if arithmetic is not None:
        batch, heads, rows, head_dim = query.shape
        pairs = visible_pairs((0, rows), (0, key.shape[2]), -1, 0 if causal else -1)
        arithmetic.flops += flops * batch * heads * head_dim * pairs
