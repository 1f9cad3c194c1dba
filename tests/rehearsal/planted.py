"""A rehearsal of a run whose name is that of a fault: the code of the product is changed accordingly."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from megatron_rb.rehearsal.job import JOB_FILE, RehearsalJob
from megatron_rb.rehearsal.packages.finder import stand_in_for_packages
from megatron_rb.rehearsal.stand_ins import StandIns
from megatron_rb.rehearsal.worker import rehearse_job

KEPT: list[torch.Tensor] = []


def rehearse(folder: Path) -> None:
    os.environ.pop("LD_PRELOAD", None)
    for file in sorted(folder.glob(f"*/{JOB_FILE}")):
        job = RehearsalJob.read(file.parent)
        with StandIns() as changes:
            stand_in_for_packages(changes, job.packages)  # a fault may import what imports them
            {**FAULTS, **FAULTS_OF_CALLS, **FAULTS_OF_TRANSFORMER_ENGINE}[job.name](changes)
            rehearse_job(job, file.parent)
        KEPT.clear()


def on_rank(number: int) -> bool:
    return os.environ["RANK"] == str(number)


def wait_in_a_block(changes: StandIns) -> None:
    from megatron_rb.models.language.blocks import DecoderLayer

    forward = DecoderLayer.forward

    def waiting(self, x, *inputs):
        out = forward(self, x, *inputs)
        out.sum().item()
        return out

    changes.set(DecoderLayer, "forward", waiting)


def tensor_kept_alive(changes: StandIns) -> None:
    from megatron_rb.models.language.blocks import DecoderLayer

    forward = DecoderLayer.forward

    def keeping(self, x, *inputs):
        KEPT.append(torch.empty(2**20, device=x.device))
        return forward(self, x, *inputs)

    changes.set(DecoderLayer, "forward", keeping)


def skipped_collective(changes: StandIns) -> None:
    from megatron.core.tensor_parallel import mappings

    reduce = mappings._reduce
    changes.set(mappings, "_reduce", lambda input_, group: input_ if on_rank(1) else reduce(input_, group))


def wrong_size(changes: StandIns) -> None:
    from megatron.core.tensor_parallel import mappings

    reduce = mappings._reduce

    def larger(input_, group):
        if on_rank(1):
            torch.distributed.all_reduce(
                torch.empty(input_.numel() + 2, dtype=input_.dtype, device="cuda"), group=group
            )
            return input_
        return reduce(input_, group)

    changes.set(mappings, "_reduce", larger)


def wrong_dtype(changes: StandIns) -> None:
    from megatron_rb.models import build

    core_config = build.core_config

    def other(*arguments):
        config = core_config(*arguments)
        config.pipeline_dtype = torch.float32 if on_rank(1) else config.pipeline_dtype
        return config

    changes.set(build, "core_config", other)


def lost_message(changes: StandIns) -> None:
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    send = P2PCommunicator.send_backward
    changes.set(P2PCommunicator, "send_backward", lambda self, *tensors: None if on_rank(1) else send(self, *tensors))


def swapped_order(changes: StandIns) -> None:
    from megatron_rb.train import totals

    reduce, held = torch.distributed.all_reduce, []

    def later(tensor, *arguments, **keywords):
        if on_rank(1) and tensor.dtype == torch.int64:
            held.append(tensor)
            return None
        result = reduce(tensor, *arguments, **keywords)
        if held:
            reduce(held.pop())
        return result

    changes.set(totals.dist, "all_reduce", later)


def kernel_that_does_not_compile(changes: StandIns) -> None:
    from megatron_rb.kernels.dynamic_padding import triton_impl

    changes.set(triton_impl, "WARPS", 3)


def _instead(changes: StandIns, call) -> None:
    """Attention of packed sequences as `call` does it; its first argument is what does it today."""
    from megatron_rb.kernels.varlen_attention import op

    changes.set(op, "_RUN", {name: partial(call, known) for name, known in op._RUN.items()})


def keyword_of_another_library(changes: StandIns) -> None:
    def call(known, q, k, v, segments, causal, keys):
        from flash_attn import flash_attn_varlen_func

        borders = segments.cu_seqlens, segments.cu_seqlens, segments.max_length, segments.max_length
        return flash_attn_varlen_func(q, k, v, *borders, is_causal=causal)

    _instead(changes, call)


def attention_in_fp32(changes: StandIns) -> None:
    _instead(changes, lambda known, q, k, v, *others: known(q.float(), k.float(), v.float(), *others).to(q.dtype))


def borders_of_64_bits(changes: StandIns) -> None:
    _other_borders(changes, lambda borders: borders.long())


def borders_in_a_row(changes: StandIns) -> None:
    _other_borders(changes, lambda borders: borders[None])


def lengths_for_borders(changes: StandIns) -> None:
    """As many numbers as borders, made on the host."""
    from megatron_rb.kernels.varlen_attention.segments import Segments

    of_lengths = Segments.of_lengths.__func__

    def other(cls, lengths):
        segments = of_lengths(cls, lengths)
        return replace(segments, cu_seqlens=segments.cu_seqlens.diff(append=segments.cu_seqlens.new_zeros(1)))

    changes.set(Segments, "of_lengths", classmethod(other))


def longest_on_the_device(changes: StandIns) -> None:
    _instead(
        changes,
        lambda known, q, k, v, segments, *others: known(
            q, k, v, replace(segments, max_length=segments.cu_seqlens.diff().max()), *others
        ),
    )


def attention_left_out(changes: StandIns) -> None:
    _instead(changes, lambda known, q, k, v, *others: q * 1)


def _other_borders(changes: StandIns, change) -> None:
    def call(known, q, k, v, segments, *others):
        return known(q, k, v, replace(segments, cu_seqlens=change(segments.cu_seqlens)), *others)

    _instead(changes, call)


def _packed(changes: StandIns, change) -> None:
    """Transformer Engine is called with other packed sequences."""
    from megatron_rb.models import transformer_engine

    made = transformer_engine.PackedSeqParams
    changes.set(transformer_engine, "PackedSeqParams", lambda **given: change(made(**given)))


def te_borders_in_a_row(changes: StandIns) -> None:
    _packed(changes, lambda packed: replace(packed, cu_seqlens_q=packed.cu_seqlens_q[None]))


def te_keyword_of_another_release(changes: StandIns) -> None:
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    forward = TEDotProductAttention.forward

    def other(self, *inputs, **given):
        self.kept_packed_seq_params.add("cu_seqlens_k")
        type(given["packed_seq_params"]).cu_seqlens_k = None
        return forward(self, *inputs, **given)

    changes.set(TEDotProductAttention, "forward", other)


def te_attention_in_fp32(changes: StandIns) -> None:
    from megatron_rb.models.transformer_engine import TransformerEngineAttention

    forward = TransformerEngineAttention.forward
    changes.set(
        TransformerEngineAttention,
        "forward",
        lambda self, q, k, v, *others: forward(self, q.float(), k.float(), v.float(), *others),
    )


FAULTS_OF_TRANSFORMER_ENGINE = {
    fault.__name__: fault for fault in (te_borders_in_a_row, te_keyword_of_another_release, te_attention_in_fp32)
}
FAULTS_OF_CALLS = {
    fault.__name__: fault
    for fault in (
        keyword_of_another_library,
        attention_in_fp32,
        borders_of_64_bits,
        borders_in_a_row,
        lengths_for_borders,
        longest_on_the_device,
        attention_left_out,
    )
}
"""Faults of calls to packages that are stood in for."""
FAULTS = {
    fault.__name__: fault
    for fault in (
        wait_in_a_block,
        tensor_kept_alive,
        skipped_collective,
        wrong_size,
        wrong_dtype,
        lost_message,
        swapped_order,
        kernel_that_does_not_compile,
    )
}
